"""The response store: what it holds is what the engine said, whoever wrote it and whatever befell the file."""

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import evalkit as ek
from evalkit.engines.hf import HFEngine
from evalkit.records import Generation, Reply, Request
from evalkit.responses import (
    Kept,
    Responses,
    StoredEngine,
    generation_key,
    kept,
    line_of,
    lock_of,
    prune,
    remove,
    score_key,
)
from evalkit.store import OUTCOMES
from tests.evalkit.test_cli import in_process
from tests.oracles import assert_same_replies
from tests.tiny import tiny_llama, tiny_tokenizer

HOW = {"fingerprint": "f" * 16, "dtype": "float32"}
ASK = {"tasks": ["quick"], "limit": 10, "max_tokens": 4}


class Counting(HFEngine):
    """How many continuations and replies were really computed."""

    scores = replies = 0

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        self.scores += sum(len(request.continuations) for request in requests)
        self.replies += sum(request.generation is not None for request in requests)
        return super().answer(requests)


@pytest.fixture
def engine() -> Counting:
    tokenizer = tiny_tokenizer()
    return Counting(tiny_llama(len(tokenizer)), tokenizer)


def requests(seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            prompt=tuple(rng.choices(range(5, 60), k=rng.randint(1, 9))),
            continuations=tuple({tuple(rng.choices(range(5, 60), k=rng.randint(1, 3))): None for _ in range(3)}),
            generation=Generation(max_tokens=5, stops=("x",), temperature=0.0, seed=seed) if i % 2 else None,
        )
        for i in range(12)
    ]


def answers(engine: StoredEngine | HFEngine, asked: Sequence[Request]) -> dict[int, Reply]:
    return dict(engine.answer(asked))


def test_nothing_is_computed_twice_and_replies_are_the_engines(engine: Counting, tmp_path: Path) -> None:
    wanted = answers(engine, requests())
    store = Responses(tmp_path, HOW)
    assert_same_replies(requests(), answers(StoredEngine(engine, store), requests()), wanted)
    store.close()
    engine.scores = engine.replies = 0
    again = Responses(tmp_path, HOW)
    found = answers(StoredEngine(engine, again), requests())
    assert_same_replies(requests(), found, wanted)
    assert (engine.scores, engine.replies, again.misses) == (0, 0, 0)
    more = [replace(one, continuations=(*one.continuations, (7, 7, 7, 7))) for one in requests()]
    assert_same_replies(
        more, answers(StoredEngine(engine, again), more), answers(HFEngine(engine.model, engine.tokenizer), more)
    )
    assert (engine.scores, engine.replies) == (len(more), 0)
    again.close()


def test_the_key_tells_apart_whatever_could_change_a_reply() -> None:
    greedy = Generation(max_tokens=5, stops=("x",), temperature=0.0, seed=0)
    others = [
        replace(greedy, max_tokens=6),
        replace(greedy, stops=("y",)),
        replace(greedy, temperature=1.0),
        replace(greedy, temperature=1.0, seed=1),
    ]
    keys = {generation_key((1, 2), one) for one in (greedy, *others)} | {generation_key((1, 2, 3), greedy)}
    assert len(keys) == 6
    assert generation_key((1, 2), replace(greedy, seed=9)) == generation_key((1, 2), greedy)
    # the same tokens, split in another place between prompt and continuation
    assert (
        len({score_key((1, 2), (3,)), score_key((1,), (2, 3)), score_key((1, 2, 3), ()), score_key((), (1, 2, 3))}) == 4
    )


def test_other_weights_dtype_or_engine_are_another_store(tmp_path: Path) -> None:
    others = (HOW, {**HOW, "dtype": "bfloat16"}, {**HOW, "fingerprint": "0"}, {**HOW, "engine": "vllm"})
    paths = set()
    for how in others:
        store = Responses(tmp_path, how)
        paths.add(store.path)
        store.close()
    assert len(paths) == 4


@pytest.mark.parametrize("damage", ["flip", "cut", "empty line", "not JSON", "other key"])
def test_a_damaged_record_is_named_and_redone(
    engine: Counting, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Responses(tmp_path, HOW)
    wanted = answers(StoredEngine(engine, store), requests())
    store.close()
    lines = store.path.read_bytes().splitlines(keepends=True)
    spoilt = lines[5]
    lines[5] = {
        "flip": spoilt.replace(b'"v":[-', b'"v":[-9'),
        "cut": spoilt[: len(spoilt) // 2] + b"\n",
        "empty line": b"\n" + spoilt,
        "not JSON": b"\x00" * 40 + b"\n",
        "other key": spoilt[:6] + b"0" * 32 + spoilt[38:],
    }[damage]
    store.path.write_bytes(b"".join(lines))
    bad = [line for one in kept(tmp_path, check=True) for line in one.damaged]
    assert bad == ([] if damage == "empty line" else [f"{store.path}, line 6"])
    again = Responses(tmp_path, HOW)
    assert_same_replies(requests(), answers(StoredEngine(engine, again), requests()), wanted)
    again.close()
    assert (again.misses > 0) == (damage != "empty line")
    if damage == "flip":
        assert "line 6: damaged reply; it is asked for again" in caplog.text
    third = Responses(tmp_path, HOW)
    assert_same_replies(requests(), answers(StoredEngine(engine, third), requests()), wanted)
    assert third.misses == 0
    third.close()


def test_a_writer_that_died_in_a_line_spoils_no_other(engine: Counting, tmp_path: Path) -> None:
    store = Responses(tmp_path, HOW)
    first = answers(StoredEngine(engine, store), requests(1))
    with open(store.path, "ab") as file:
        file.write(b'{"k":"0123')
    second = answers(StoredEngine(engine, store), requests(2))
    store.close()
    again = Responses(tmp_path, HOW)
    assert_same_replies(requests(1), answers(StoredEngine(engine, again), requests(1)), first)
    assert_same_replies(requests(2), answers(StoredEngine(engine, again), requests(2)), second)
    assert again.misses == 0
    again.close()


def test_a_full_disk_is_told_and_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Responses(tmp_path, HOW)
    store.put("a" * 32, [1.0])
    store.flush()
    size = store.path.stat().st_size

    class Full:
        def __init__(self, file: object) -> None:
            self.file = file

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def write(self, block: memoryview) -> int:
            self.file.write(block[:10])  # type: ignore[attr-defined]
            raise OSError(28, "No space left on device")

    whole = store._file
    monkeypatch.setattr(store, "_file", Full(whole))
    store.put("b" * 32, [2.0])
    with pytest.raises(OSError, match="No space left"):
        store.flush()
    assert store.path.stat().st_size == size
    monkeypatch.setattr(store, "_file", whole)
    store.flush()  # there is room again: what waited is written
    assert store.get("a" * 32) == [1.0] and store.get("b" * 32) == [2.0]
    store.close()


WRITER = """
import sys
from pathlib import Path
from evalkit.responses import Responses
store = Responses(Path(sys.argv[1]), {"fingerprint": "x"})
for i in range(300):
    store.put(f"{sys.argv[2]}{i:031d}", [float(i), "\\u00e9" * (i % 50)])
store.close()
"""


def test_two_processes_share_a_store(tmp_path: Path) -> None:
    both = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), who]) for who in "ab"]
    assert [one.wait() for one in both] == [0, 0]
    store = Responses(tmp_path, {"fingerprint": "x"})
    for who in "ab":
        for i in range(300):
            assert store.get(f"{who}{i:031d}") == [float(i), "é" * (i % 50)]
    assert not [line for one in kept(tmp_path, check=True) for line in one.damaged]
    store.close()


def test_a_killed_writer_leaves_whole_replies(tmp_path: Path) -> None:
    code = WRITER.replace("store.close()", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path), "a"]).returncode == -9
    (one,) = kept(tmp_path, check=True)
    assert one.replies >= 192 and not one.damaged  # at most the last block of 64 was still waiting


def test_runs_take_replies_of_other_runs_and_are_the_same(tiny_folder: Path, tmp_path: Path) -> None:
    plain = ek.run(tiny_folder, **ASK, out=tmp_path / "plain")
    cached = [ek.run(tiny_folder, **ASK, cache_dir=tmp_path / "cache", out=tmp_path / f"run{i}") for i in range(2)]
    assert cached[0].records("quick") == cached[1].records("quick") == plain.records("quick")
    written = [sorted((tmp_path / name / OUTCOMES).read_bytes().split(b"\n")) for name in ("run0", "run1")]
    assert written[0] == written[1]  # in another order: what is held comes first
    (one,) = kept(tmp_path / "cache")
    lines = one.path.read_bytes().count(b"\n")
    ek.run(tiny_folder, **{**ASK, "limit": 5}, cache_dir=tmp_path / "cache")
    assert one.path.read_bytes().count(b"\n") == lines


def test_the_commands(tiny_folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    done = in_process("run", tiny_folder, "-t", "quick", "--limit", 4, "--cache-dir", cache, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    (shown,) = json.loads(in_process("cache", "show", cache, "--json").stdout)
    assert shown["model"] == str(tiny_folder) and shown["replies"] > 4 and shown["engine"] == "hf"
    assert in_process("cache", "verify", cache).returncode == 0
    file = Path(shown["path"])
    file.write_bytes(file.read_bytes().replace(b'"c":"', b'"c":"0', 1))
    done = in_process("cache", "verify", cache)
    assert done.returncode == 1 and "line 2: damaged" in done.stdout
    assert in_process("cache", "prune", cache).returncode == 0
    assert in_process("cache", "verify", cache).returncode == 0
    os.utime(file, (0, 0))
    told = json.loads(in_process("cache", "prune", cache, "--older-than", 30, "--json").stdout)
    assert told["removed"] == 1 and told["bytes"] > 0 and not file.exists()
    done = in_process("cache", "show", tmp_path / "nowhere")
    assert done.returncode == 2 and "nowhere" in done.stderr
    (cache / "responses" / "strange.jsonl").write_text("hello\n")
    assert "(damaged)" in in_process("cache", "show", cache).stdout
    done = in_process("cache", "verify", cache)
    assert done.returncode == 1 and "strange.jsonl, line 1: damaged" in done.stdout
    assert in_process("cache", "prune", cache).returncode == 0
    assert not kept(cache)


def test_the_store_says_what_it_took_and_added(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for out, told in (("a", "0 replies taken"), ("b", ", 0 added")):
        caplog.clear()
        words = ["-t", "quick", "--limit", 2, "--cache-dir", tmp_path / "cache", "--out", tmp_path / out]
        assert in_process("run", tiny_folder, *words).returncode == 0
        assert told in caplog.text


@pytest.mark.parametrize("change", [prune, remove])
def test_a_run_goes_on_in_the_file_that_took_the_old_ones_place(change: Callable[[Kept], int], tmp_path: Path) -> None:
    store = Responses(tmp_path, HOW)
    store.put("a" * 32, [1.0])
    store.flush()
    change(kept(tmp_path)[0])
    for n in range(10):
        store.put(f"{n:032d}", [float(n)])
    store.flush()
    assert store.get("0" * 31 + "7") == [7.0] and store.added == 11
    store.close()
    (one,) = kept(tmp_path, check=True)
    assert (one.replies, one.damaged) == (11 if change is prune else 10, ())


def test_a_line_that_is_being_written_is_not_called_damaged(tmp_path: Path) -> None:
    store = Responses(tmp_path, HOW)
    whole = line_of("c" * 32, [1.0])
    found: list[Kept] = []
    checking = threading.Thread(target=lambda: found.extend(kept(tmp_path, check=True)))
    with lock_of(store.path), open(store.path, "ab", buffering=0) as file:
        file.write(whole[:30])
        checking.start()
        checking.join(0.2)
        assert not found, "it waits"
        file.write(whole[30:])
    checking.join()
    assert [(one.replies, one.damaged) for one in found] == [(1, ())]
    store.close()


def test_a_file_under_another_name_is_not_used(tmp_path: Path) -> None:
    paths = []
    for how in (HOW, {**HOW, "dtype": "bfloat16"}):
        store = Responses(tmp_path, how)
        store.close()
        paths.append(store.path)
    paths[0].replace(paths[1])
    with pytest.raises(ValueError, match="is not named after what its first line says"):
        Responses(tmp_path, {**HOW, "dtype": "bfloat16"})
    (one,) = kept(tmp_path)
    assert one.damaged == (f"{paths[1]}, line 1",)


def test_a_live_module_is_refused(engine: Counting, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a live module"):
        ek.run(engine.model, tokenizer=engine.tokenizer, **ASK, cache_dir=tmp_path)
