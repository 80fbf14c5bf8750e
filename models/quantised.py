"""Quantised checkpoints: what reads each format here, what computes with it, and how many bits a weight takes.

GGUF, compressed-tensors, torchao, GPTQ, AWQ and bitsandbytes are read by transformers and the packages that it asks
for. One checkpoint can be computed in several ways (unpacked when loaded, packed in one kernel or another), and each
way may give other scores: so the kernel is named beside the format, in the fingerprint too.
"""

import importlib.metadata
import inspect
import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import cached_file

WEIGHT_FILES = (".safetensors", ".bin")
SAFETENSORS = "model.safetensors"
UNPACKED = "dequantised when loaded"
NOT_THE_MODEL = {"compressed-tensors": ("version", "quantization_status", "observer", "observer_kwargs")}
"""Of a method's config, what says by which version and how the weights were found, not what they are."""
WRITTEN_AS_OFF = ("include_input_output_embeddings", "untie_embedding_weights")
"""Options that newer versions write down as false, and older ones don't know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """What reads one format here."""

    title: str
    packages: tuple[str, ...]
    extra: str
    vllm: bool
    """Whether vLLM runs it too."""


FORMATS = {
    "gguf": Format(title="GGUF", packages=("gguf", "accelerate"), extra="gguf", vllm=False),
    "compressed-tensors": Format(
        title="compressed-tensors", packages=("compressed-tensors",), extra="compressed-tensors", vllm=True
    ),
    "torchao": Format(title="torchao", packages=("torchao",), extra="torchao", vllm=True),
    "gptq": Format(title="GPTQ", packages=("gptqmodel", "optimum", "accelerate"), extra="gptq", vllm=True),
    "awq": Format(title="AWQ", packages=("gptqmodel", "accelerate"), extra="awq", vllm=True),
    "bitsandbytes": Format(
        title="bitsandbytes", packages=("bitsandbytes", "accelerate"), extra="bitsandbytes", vllm=True
    ),
}
"""transformers' name of a method -> what reads it; transformers alone knows of the others (fp8, mxfp4, ...)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """How the weights of a quantised checkpoint are stored."""

    method: str
    config: Mapping[str, Any]
    """The checkpoint's quantization_config; of a GGUF file its tensors by type."""
    detail: str
    """What the method's name leaves open: a GGUF file's types, a compressed-tensors format."""
    size: int = 0
    """Bytes of the weights' files; 0: not known yet."""

    @property
    def title(self) -> str:
        title = FORMATS[self.method].title if self.method in FORMATS else self.method
        return f"{title} ({self.detail})" if self.detail else title

    @property
    def needs_device_map(self) -> bool:
        """Whether the method's layers must be made where they run."""
        return self.method != "gguf" and (self.method not in FORMATS or "accelerate" in FORMATS[self.method].packages)


# --- what a checkpoint is ---------------------------------------------------------------------------------------


def gguf_place(source: str) -> tuple[str, str] | None:
    """(folder or hub id, file) of a GGUF file's path or of ``org/name/file.gguf``; None: no GGUF file."""
    if not source.endswith(".gguf"):
        return None
    if Path(source).is_file():
        return str(Path(source).parent), Path(source).name
    organisation, name, file = source.split("/", 2)
    return f"{organisation}/{name}", file


def gguf_in(folder: Path) -> Path | None:
    """The GGUF file of a folder without other weights. ValueError where there are several."""
    if any(file.suffix in WEIGHT_FILES for file in folder.iterdir()):
        return None
    found = sorted(folder.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"folder {folder} holds {len(found)} GGUF files ({names}); name one: {found[0]}")
    return found[0] if found else None


def tokenizer_beside(folder: str | Path) -> bool:
    """Whether a tokenizer lies beside a GGUF file; it goes before the one inside, whose rules transformers guesses."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def stored(source: str, options: Mapping[str, Any], here: bool = True) -> Stored | None:
    """How the checkpoint at ``source`` (folder, hub id or GGUF file) is quantised; None: it isn't.

    options: revision and trust_remote_code. here: transformers is to run it. ValueError: no package then reads it, or a
    GGUF file is damaged.
    """
    place = gguf_place(source)
    if place is not None:
        need("gguf")
        return _stored_gguf(Path(cached_file(*place, revision=options.get("revision"))))
    config = AutoConfig.from_pretrained(source, **options)
    # In either place, as transformers looks for it.
    known = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )
    if known is None:
        return None
    method = _method(known)
    if here and method not in FORMATS and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise ValueError(
            f"its quantization_config has the quant_method {method!r}, which transformers {transformers.__version__} "
            f"doesn't know; known are {', '.join(sorted(set(FORMATS) | set(AUTO_QUANTIZATION_CONFIG_MAPPING)))}"
        )
    if here:
        need(method)
    return Stored(method=method, config=known, detail=_detail(method, known))


def weight_files(source: str, revision: str | None = None, name: str = SAFETENSORS) -> list[Path]:
    """The weights' files at ``source`` (folder or hub id, from where they are fetched): those that the index of
    ``name`` lists, else ``name`` alone; empty: there is neither. ValueError: one that is listed is not there."""
    how: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    index = cached_file(source, f"{name}.index.json", **how)
    if index is None:
        one = cached_file(source, name, **how)
        return [] if one is None else [Path(one)]
    names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    found = {name: cached_file(source, name, **how) for name in names}
    missing = [name for name, file in found.items() if file is None]
    if missing:
        raise ValueError(f"{index} lists {', '.join(missing[:3])}, which is not there; download or save it again")
    return [Path(file) for file in found.values()]


def with_size(known: Stored, source: str, revision: str | None = None) -> Stored:
    """``known`` with the bytes of its weights, which are on this machine by now."""
    if known.size:
        return known
    files = weight_files(source, revision) or weight_files(source, revision, "pytorch_model.bin")
    return replace(known, size=sum(file.stat().st_size for file in files))


def unpacking(source: str, known: Stored, options: Mapping[str, Any]) -> Any:
    """The model's config with the order to unpack its weights while loading. ValueError: transformers can't."""
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(known.method)
    if kind is None or "dequantize" not in inspect.signature(kind).parameters:
        raise ValueError(f"transformers {transformers.__version__} can't unpack {known.title} while loading")
    config = AutoConfig.from_pretrained(source, **options)
    config.quantization_config = {**known.config, "dequantize": True}
    return config


def need(method: str) -> None:
    """ValueError names the packages that ``method`` lacks here."""
    if method not in FORMATS:
        return
    how = FORMATS[method]
    missing = [package for package in how.packages if not version_of(package)]
    if missing:
        other = "; on a GPU, --engine vllm runs it too" if how.vllm else ""
        raise ValueError(
            f"its format is {how.title}, which needs {' and '.join(missing)} here: "
            f"pip install 'evalkit[{how.extra}]'{other}"
        )


def version_of(package: str) -> str:
    """Empty where ``package`` is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _method(config: Mapping[str, Any]) -> str:
    method = config.get("quant_method")
    if config.get("load_in_4bit") or config.get("load_in_8bit"):  # bitsandbytes, before it wrote its name
        method = "bitsandbytes"
    return str(getattr(method, "value", method))


def _detail(method: str, config: Mapping[str, Any]) -> str:
    if method == "bitsandbytes":
        return str(config.get("bnb_4bit_quant_type") or "") if config.get("load_in_4bit") else "int8"
    if method == "torchao":
        kind = config.get("quant_type")
        kind = kind.get("default", kind) if isinstance(kind, Mapping) else kind
        return str(kind.get("_type") if isinstance(kind, Mapping) else kind).removesuffix("Config")
    bits = config.get("bits")
    return str(config.get("format") or (f"{bits} bits" if bits else ""))


def _stored_gguf(file: Path) -> Stored:
    """Read the head of a GGUF file. ValueError: it is cut off or damaged, or lacks a tokenizer."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{file} is no whole GGUF file ({error}); download it again") from error
    if "split.count" in reader.fields and reader.fields["split.count"].contents() > 1:
        raise ValueError(f"{file} is one of several parts; join them with llama-gguf-split --merge")
    if "tokenizer.ggml.model" not in reader.fields and not tokenizer_beside(file.parent):
        raise ValueError(f"{file} has no tokenizer in it; put the model's tokenizer.json beside it")
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    return Stored(
        method="gguf",
        config={"quant_method": "gguf", "tensors": dict(sorted(types.items()))},
        detail=", ".join(name for name, _ in types.most_common()),
        size=file.stat().st_size,
    )


# --- how it is computed -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """A quantised model as it was loaded."""

    method: str
    title: str
    """The format, for reports."""
    kernel: str
    """What multiplies by the weights."""
    config: Mapping[str, Any]
    """What the checkpoint says of its format, without what is off or empty."""
    parameters: int
    """Of the model, however they are packed."""
    size: int = 0
    """Bytes of the weights' files; 0: unknown."""

    @property
    def note(self) -> str:
        bits = f", {8 * self.size / self.parameters:.1f} bits a weight ({self.size / 1e6:.0f} MB)" if self.size else ""
        return f"{self.title}{bits}, {self.kernel}"

    @property
    def versions(self) -> dict[str, str]:
        """Of the packages that read and compute it."""
        packages = FORMATS[self.method].packages if self.method in FORMATS else ()
        return {package: version_of(package) for package in packages if version_of(package)}


def quantisation(model: Any, known: Stored | None = None) -> Quantisation | None:
    """How ``model`` is quantised; None: it isn't. known: the checkpoint it was loaded from, where there is one."""
    if known is None:
        live = getattr(model.config, "quantization_config", None)
        if live is None:
            return None
        config = live if isinstance(live, Mapping) else live.to_dict()
        known = Stored(method=_method(config), config=config, detail=_detail(_method(config), config))
    with torch.device("meta"):
        plain = type(model)(model.config)
    return packed_as(known, kernel(model), sum(parameter.numel() for parameter in plain.parameters()))


def packed_as(known: Stored, kernel: str, parameters: int) -> Quantisation:
    """``known`` as it runs in ``kernel``; parameters: of the plain model."""
    return Quantisation(
        method=known.method,
        title=known.title,
        kernel=kernel,
        config=_on(known.config, NOT_THE_MODEL.get(known.method, ())),
        parameters=parameters,
        size=known.size,
    )


def unpack(model: Any) -> None:
    """Unpack compressed-tensors now: by itself it would at the first pass, behind wrappers around every layer that
    keep the output head from running in float32. Activations are rounded all the same, where the format says so."""
    if not hasattr(model, "ct_decompress_hook"):
        return
    from compressed_tensors.compressors import decompress_module

    for module in model.modules():
        decompress_module(module)
    model.ct_decompress_hook.remove()
    del model.ct_decompress_hook


def kernel(model: Any) -> str:
    """What computes the quantised layers of ``model``: their classes, with the package they are of."""
    found = set()
    for module in model.modules():
        wrapped = [one for one in module.parameters(recurse=False) if is_traceable_wrapper_subclass(one)]
        if wrapped:
            found |= {_name(one) for one in wrapped}
        elif hasattr(module, "quantization_scheme"):
            found.add("unpacked by compressed-tensors")
        elif _is_packed(module):
            found.add(_name(module))
    if not found:
        quantiser = getattr(model, "hf_quantizer", None)
        config = getattr(quantiser, "quantization_config", None)
        # Of a GGUF file transformers unpacks what it has no kernel for, whatever it was told.
        if config is None or getattr(config, "dequantize", False) or _method(config.to_dict()) == "gguf":
            return UNPACKED
        found.add(_name(quantiser))
    return f"{' and '.join(sorted(found))} on {next(model.parameters()).device.type}"


def tensors(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """(name, plain tensor) of what ``tensor`` is made of: a packed one of torchao of its values and scales."""
    if not is_traceable_wrapper_subclass(tensor):
        return [(name, tensor)]
    inner = tensor.__tensor_flatten__()[0]
    return [pair for part in inner for pair in tensors(f"{name}.{part}", getattr(tensor, part))]


def _is_packed(module: Any) -> bool:
    """Whether ``module`` itself holds integers or one-byte floats that are weights, under whatever name."""
    fleeting = module._non_persistent_buffers_set
    buffers = {
        # Position ids and counters are int64, masks bool (in old code uint8, by the name of "bias").
        name: one
        for name, one in module.named_buffers(recurse=False)
        if name not in fleeting and name != "bias" and one.dtype not in (torch.int64, torch.bool) and one.dim() > 1
    }
    own = [*module.parameters(recurse=False), *buffers.values()]
    return any(not one.is_floating_point() or one.element_size() == 1 for one in own)


def _name(thing: Any) -> str:
    kind = type(thing)
    return f"{kind.__module__.partition('.')[0]} {kind.__name__}"


def _on(config: Any, without: Collection[str]) -> Any:
    """``config`` but for ``without`` and what is empty or written down as off: newer versions add options."""
    if isinstance(config, Mapping):
        kept = {str(name): _on(value, without) for name, value in config.items() if name not in without}
        return {
            name: value
            for name, value in kept.items()
            if not (value is None or value in ("", [], {}) or (value is False and name in WRITTEN_AS_OFF))
        }
    if isinstance(config, (list, tuple)):
        return [_on(value, without) for value in config]
    return getattr(config, "value", config)
