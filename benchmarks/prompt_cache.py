"""What llama-server keeps of the prompts that it has read, and which slot gets one.

As in its `server-context.cpp` and `server-task.cpp` (b10068):

* Of the idle slots, that one is taken which has the longest common beginning with the
  prompt, if that is more than a tenth of it (`--slot-prompt-similarity`).
* Otherwise, the slot that has been idle for longest.
* What the slot had is saved (`--cache-ram`), unless half of it or more stays in use.
  Only then is there a look at the saved states: one that has more in common with the
  prompt takes the slot's place, if more of it stays in use than of what the slot had.
* The slots that stay idle are saved as well (`--cache-idle-slots`), and keep theirs.

So a conversation is not found where another slot has a short prompt with the same
beginning, half of which is a common system prompt.

Here a prompt is its text, and memory is counted in states.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SIMILARITY = 0.1
KEEPS_HALF = 0.5  # of a slot's state: it need not be saved
WORTH_TAKING = 0.25  # of a saved state: less in common is no reason to take it


@dataclass(eq=False)
class Slot:
    """A slot and its last state, a prompt with its answer."""

    text: str = ""
    used_at: int = -1
    busy: bool = False


class PromptCache:
    """The slots of a server, and the states that it has saved."""

    def __init__(self, slots: int, kept: int) -> None:
        """Begin with empty slots; at most `kept` states are saved."""
        self.slots = [Slot() for _ in range(slots)]
        self.kept = kept
        self._states: list[str] = []  # the oldest first
        self._uses = 0

    def __repr__(self) -> str:
        busy = sum(slot.busy for slot in self.slots)
        return f"<PromptCache {busy}/{len(self.slots)} busy, {len(self._states)} saved>"

    def take(self, prompt: str) -> tuple[Slot, int] | None:
        """Take a slot; give it with the length of what need not be read again.

        None if all are busy.
        """
        idle = [slot for slot in self.slots if not slot.busy]
        if not idle:
            return None
        slot, found = _most_similar(idle, prompt)
        similar = found > SIMILARITY * len(prompt)
        if not similar:
            slot = min(reversed(idle), key=lambda each: each.used_at)
            found = common(slot.text, prompt)
        if not similar or found < KEEPS_HALF * len(slot.text):
            self._save(slot.text)
            found = self._restore(slot, prompt, found)
        for other in idle:
            if other is not slot:
                self._save(other.text)
        del self._states[: max(0, len(self._states) - self.kept)]
        slot.busy, slot.text = True, prompt
        return slot, found

    def give_back(self, slot: Slot, text: str) -> None:
        """End a slot's work, which leaves it in this state."""
        self._uses += 1
        slot.busy, slot.text, slot.used_at = False, text, self._uses

    def _save(self, text: str) -> None:
        if not text or any(state.startswith(text) for state in self._states):
            return
        # States that are a beginning of this one are of no use any more.
        self._states = [each for each in self._states if not text.startswith(each)]
        self._states.append(text)

    def _restore(self, slot: Slot, prompt: str, found: int) -> int:
        # Anything is better than an empty slot.
        best, kept = None, found / len(slot.text) if slot.text else -1.0
        for state in self._states:
            shared = common(state, prompt)
            part = shared / len(state)
            if part >= WORTH_TAKING and part > kept and shared > found:
                best, kept, found = state, part, shared
        if best is not None:
            self._states.remove(best)
        return found


def _most_similar(slots: Iterable[Slot], prompt: str) -> tuple[Slot, int]:
    found = [(common(slot.text, prompt), slot) for slot in slots]
    length, slot = max(found, key=lambda each: each[0])
    return slot, length


def common(one: str, other: str) -> int:
    """Return the length of the common beginning of two texts, in whole words.

    The real one compares tokens: half of a word is nothing in common.
    """
    length = alike(one, other)
    if length < min(len(one), len(other)):
        length = max(one.rfind(" ", 0, length), one.rfind("\n", 0, length)) + 1
    return length


def alike(one: str, other: str) -> int:
    """Count the characters that two texts begin with, comparing long parts at once."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
