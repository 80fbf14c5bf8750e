"""What a person sees of a run."""

import io

from rich.console import Console

from distill.progress import end_sentence, guard_sentence, numbers, shown

GUARD = {
    "stage": "distill",
    "tokens": 2_000_000,
    "total_tokens": 7_000_000,
    "guard": {"gsm8k": {"accuracy": 0.25, "unparsed": 0.125, "items": 64.0}},
}
END = {
    "stage": "distill",
    "tokens": 2_000_000,
    "total_tokens": 7_000_000,
    "end": True,
    "probe": {"before": 3.25, "after": 0.5},
    "left_out": {"longer than seq_len (512 tokens)": 3},
}


def test_the_guards_sentence_says_that_it_is_of_train_items() -> None:
    assert guard_sentence(GUARD) == (
        "distill after 2,000,000 tokens, generating on TRAIN items held out: gsm8k 25% right, 12% unparsed (n = 64)"
    )


def test_a_stages_end_says_what_it_did_to_the_fixed_batch_and_what_was_left_out() -> None:
    assert end_sentence(END) == (
        "distill: loss on one fixed batch 3.2500 before, 0.5000 after 2,000,000 tokens; 3 examples left out: longer "
        "than seq_len (512 tokens)"
    )


def test_a_step_shows_mfu_where_it_is_known() -> None:
    row = {"loss": 1.23456, "tokens_per_s": 140_123.4}
    assert numbers(row) == "loss 1.2346 · 140,123 tokens/s"
    assert numbers({**row, "mfu": 0.314}) == "loss 1.2346 · 140,123 tokens/s · MFU 31%"


def test_a_resumed_stage_begins_where_it_stopped_and_events_have_lines_of_their_own() -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=300, force_terminal=True, color_system=None, highlight=False)
    with shown(console) as report:
        report({"stage": "distill", "step": 30, "steps": 40, "begin": True})
        report({"stage": "distill", "step": 31, "loss": 1.0, "tokens_per_s": 5.0})
        report(GUARD)
        report(END)
    text = screen.getvalue()
    assert "31/40" in text and guard_sentence(GUARD) in text and end_sentence(END) in text


def test_nothing_is_shown_where_it_is_not_wanted() -> None:
    screen = io.StringIO()
    with shown(Console(file=screen), wanted=False) as report:
        report(END)
    assert screen.getvalue() == ""
