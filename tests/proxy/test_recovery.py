"""The rest of a broken answer, as the client gets it from other workers."""

from __future__ import annotations

import json

import pytest

from gollama_proxy.edge.response import Client
from gollama_proxy.proxy.recovery import Resume
from gollama_proxy.wire.errors import ProxyError, WorkerError
from gollama_proxy.wire.partial import DivergedError
from tests.fakes.replies import done, finish, role, token

# Blanks that no program writes, by which an unchanged body is known.
BODY = b'{"model":"tiny" ,  "stream":true,"messages":[{"role":"user","content":"hi"}]}'
BEGUN = role() + token(" no") + token(" to")


class Recorder:
    """What a client of the hub has received."""

    def __init__(self) -> None:
        self.sent = b""
        self.failures: list[ProxyError] = []
        self.client = Client(self._send, self.drain, lambda: 0, chunked=False)

    def __repr__(self) -> str:
        return f"<Recorder {len(self.sent)} bytes>"

    def _send(self, data: bytes) -> None:
        self.sent += data

    async def drain(self) -> None:
        pass


def resumed(relayed: bytes = BEGUN) -> Resume:
    resume = Resume.begin(BODY, "tiny", True, relayed)
    assert resume is not None
    return resume


def rest_for(resume: Resume, recorder: Recorder, worker: str = "b") -> Client:
    return resume.client_of(
        recorder.client, "tiny", worker, fail=recorder.failures.append
    )


def test_the_whole_answer_is_asked_for_with_the_clients_own_bytes() -> None:
    resume = resumed()
    assert json.loads(resume.request("tiny"))["messages"][-1]["content"] == " no to"
    assert resume.ask_for_all()
    assert resume.request("tiny") == BODY
    assert not resume.ask_for_all()  # that was the last way
    resume = resumed()
    assert resume.ask_for_all()
    assert json.loads(resume.request("other"))["model"] == "other"


def test_a_continuation_drains_as_its_client_does_and_has_no_frames() -> None:
    recorder = Recorder()
    client = rest_for(resumed(), recorder)
    assert client.drain == recorder.drain
    assert client.chunked is False


def test_each_continuation_that_sent_something_is_counted() -> None:
    resume, recorder = resumed(), Recorder()
    for number in (1, 2, 3):
        resume.request("tiny")
        assert not resume.broke()  # nothing was sent
        client = rest_for(resume, recorder)
        assert not resume.broke()
        client = rest_for(resume, recorder)
        echo = token(resume.partial.text)
        client.send(role() + echo + token(f" wu{number}"))
        comment = f": gollama rescued {number} by b\n\n".encode()
        assert recorder.sent.count(comment) == 1
        assert resume.broke() is True
        assert not resume.broke()
        assert resume.count == number
    client = rest_for(resume, recorder)
    client.send(role() + token(resume.partial.text) + finish() + done())
    resume.finish()
    assert resume.count == 4
    assert recorder.sent.endswith(done())
    assert not recorder.failures


def test_after_another_answer_nothing_more_is_sent() -> None:
    resume, recorder = resumed(), Recorder()
    resume.request("tiny")
    client = rest_for(resume, recorder)
    client.send(role() + token("something else") + token(" altogether"))
    [failure] = recorder.failures
    assert isinstance(failure, DivergedError)
    client.send(token(" no to") + finish() + done())
    assert recorder.sent == b""
    assert len(recorder.failures) == 1
    with pytest.raises(WorkerError) as raised:
        resume.finish()
    assert raised.value is failure
    assert resume.count == 0


def test_an_answer_that_lacks_only_its_end_is_closed_as_its_api_does() -> None:
    chat = resumed(BEGUN + finish())
    assert chat.exhausted
    assert chat.closing().endswith(b"data: [DONE]\n\n")
    assert not resumed().exhausted
