"""The words that tables and figures share for a measured time: verdicts, their explanation, one sentence per phase."""

from collections.abc import Iterable, Sequence

from selab import units
from selab.records.types import Latency
from selab.records.verdict import NOT_SIGNIFICANT, TOO_NOISY, change_words
from selab.units import NONE

FAILED = "failed"
_EXPLAINED = {
    NOT_SIGNIFICANT: "not significant, no difference is shown; the brackets hold what is not excluded",
    TOO_NOISY: "figures are rough and not to be quoted; measure longer or on a quieter machine",
}


def verdict_word(latency: Latency) -> str:
    """Return `slower`, `faster`, `equal`, `n.s.`, `too noisy` or `failed`."""
    if latency.error:
        return FAILED
    return {"undecided": NOT_SIGNIFICANT, "no_result": TOO_NOISY}.get(latency.verdict_kind, latency.verdict_kind)


def verdict_sentence(latency: Latency) -> str:
    """Return the verdict of a record in words; where there is no result, `too noisy` or `failed` and why."""
    reasons = latency.verdict.removeprefix("no result: ")
    return f"{verdict_word(latency)}: {reasons}" if latency.verdict_kind == "no_result" else latency.verdict


def explained(texts: Iterable[str]) -> tuple[str, ...]:
    """Return one note that explains the words `n.s.` and `too noisy`, as far as the texts use them."""
    found = list(texts)
    used = [f"{word}: {meaning}" for word, meaning in _EXPLAINED.items() if any(word in text for text in found)]
    return (f"{'. '.join(used)}.",) if used else ()


def words_note(rows: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Return one note that explains the words `n.s.` and `too noisy`, as far as the rows of a table use them."""
    return explained(cell for row in rows for cell in row)


def time_words(seconds: float | None) -> str:
    """Return a time, or a dash."""
    return NONE if seconds is None else units.seconds(seconds)


def tax_words(latency: Latency | None) -> str:
    """Return what an implementation adds, or why there is no figure."""
    if latency is not None and latency.error:
        return FAILED
    return TOO_NOISY if latency is not None and latency.ratio is None else change_words(latency)
