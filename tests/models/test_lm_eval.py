"""A hybrid's folder in lm-evaluation-harness: `lm_eval run --model hf` loads it by its remote file and scores it."""

import json
from pathlib import Path

import pytest

import evalkit
from evalkit.records import LOGLIKELIHOOD
from tests.models.hybrids import tiny_hybrid, tiny_teacher
from tests.models.test_remote import elsewhere
from tests.tasks.lm_eval_cases import CASES, yaml_of
from tests.tiny import tiny_tokenizer

pytestmark = [
    pytest.mark.usefixtures("lm_eval"),
    pytest.mark.filterwarnings("ignore:::lm_eval", "ignore:::datasets", "ignore:::multiprocess"),  # theirs, not ours
]

SCRIPT = """
warnings.simplefilter("default")
import json, torch.utils.collect_env
torch.utils.collect_env.get_pretty_env_info = str  # lm-eval asks pip and the shell, for a second
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
done = simple_evaluate(
    model="hf", model_args="pretrained=hybrid,trust_remote_code=True,dtype=float32", tasks=["mine.yaml"], device="cpu",
    batch_size=2, num_fewshot=1, log_samples=True, bootstrap_iters=0, task_manager=TaskManager(include_defaults=False),
)
assert not any(name.split(".")[0] in OURS for name in sys.modules)
samples = sorted(done["samples"]["mine"], key=lambda sample: sample["doc_id"])
print(json.dumps([[resp[0] for resp in sample["filtered_resps"]] for sample in samples]))
"""


def test_lm_eval_loads_a_hybrid_where_evalkit_is_not_installed_and_scores_as_evalkit_does(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_hybrid(tiny_teacher("qwen3", vocab_size=len(tokenizer), max_position_embeddings=512))
    model.save_pretrained(tmp_path / "hybrid")
    tokenizer.save_pretrained(tmp_path / "hybrid")
    case = CASES["arc_easy"]
    for split in ("test", "train"):
        lines = "".join(json.dumps(row) + "\n" for row in case.splits[split])
        (tmp_path / f"{split}.jsonl").write_text(lines)
    (tmp_path / "mine.yaml").write_text(
        f"include: {yaml_of(case)}\ntask: mine\ndataset_path: json\ndataset_name: null\nvalidation_split: null\n"
        f"dataset_kwargs:\n  cache_dir: {tmp_path / 'cache'}\n  data_files:\n"
        f"    test: {tmp_path / 'test.jsonl'}\n    train: {tmp_path / 'train.jsonl'}\n"
    )
    said = elsewhere(SCRIPT.replace("OURS", repr(("models", "evalkit", "tasks", "distill"))), tmp_path)
    theirs = json.loads(said.splitlines()[-1])
    run = evalkit.run(
        str(tmp_path / "hybrid"), f"lm_eval:{tmp_path / 'mine.yaml'}", shots=1, mode="loglikelihood", device="cpu"
    )
    for record, sums in zip(run.records("lm_eval:mine").values(), theirs, strict=True):
        outcome = record.outcome(LOGLIKELIHOOD, "native")
        assert outcome is not None and outcome.logprobs == pytest.approx(sums, abs=1e-4)
