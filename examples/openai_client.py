"""Ask the hub a question with the official `openai` package, and show the worker.

    export OPENAI_BASE_URL=http://127.0.0.1:8000/v1
    export OPENAI_API_KEY=$(gollama-proxy token --sub alice)
    python examples/openai_client.py "Why is the sky blue?"

The answer goes to standard output, details about it to standard error.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable

import openai
from openai.types.chat import ChatCompletionChunk


def main() -> str | None:
    """Return None after a complete answer, else the problem: `sys.exit` prints it."""
    env = os.environ.get
    base_url = env("OPENAI_BASE_URL") or "http://127.0.0.1:8000/v1"
    parser = argparse.ArgumentParser(description="Stream one answer from the hub.")
    parser.add_argument("question", nargs="?", default="Write a haiku about rivers.")
    parser.add_argument("--base-url", default=base_url, help="default: %(default)s")
    parser.add_argument("--token", default=env("OPENAI_API_KEY") or "none")
    parser.add_argument("--model", help="default: the first that the hub lists")
    parser.add_argument("--retries", type=int, default=2, help="of the SDK, on 5xx")
    args = parser.parse_args()
    client = openai.OpenAI(
        base_url=args.base_url, api_key=args.token, max_retries=args.retries
    )
    try:
        models = [model.id for model in client.models.list()]
        print("models:", ", ".join(models) or "none at the moment", file=sys.stderr)
        if not (args.model or models):
            return "No worker serves a model."
        start = time.monotonic()
        # Only the raw response has the headers; `parse()` returns the usual stream.
        reply = client.chat.completions.with_raw_response.create(
            model=args.model or models[0],
            messages=[{"role": "user", "content": args.question}],
            stream=True,
            stream_options={"include_usage": True},
        )
    except openai.APIConnectionError as error:  # including timeouts
        return f"The hub at {args.base_url} cannot be reached: {error.__cause__}"
    except openai.AuthenticationError as error:
        return f"The hub does not accept this token (401): {error.message}"
    except openai.NotFoundError as error:
        return f"The hub does not know this model or address (404): {error.message}"
    except openai.APIStatusError as error:
        # The SDK has waited and tried `--retries` times before it raises a 503.
        wait = error.response.headers.get("Retry-After")
        later = f" Try again in {wait} s." if wait else ""
        return f"The hub refused ({error.status_code}): {error.message}{later}"
    print("worker:", reply.headers.get("X-Gollama-Worker", "?"), file=sys.stderr)
    try:
        return show(reply.parse(), start)
    except openai.APIError as error:  # an error event, or the connection was lost
        return f"\nThe answer broke off: {error.message}"


def show(chunks: Iterable[ChatCompletionChunk], start: float) -> str | None:
    """Print the answer as it arrives; return the problem if it is incomplete."""
    first = last = usage = finish = None
    for chunk in chunks:
        for choice in chunk.choices:  # the chunk with the usage has none
            if choice.delta.content:
                last = time.monotonic()
                first = first or last
                print(choice.delta.content, end="", flush=True)
            finish = choice.finish_reason or finish
        usage = chunk.usage or usage
    print()
    if finish is None:
        return "The answer broke off: it ended without a finish reason."
    if usage and first and last:
        tokens = usage.completion_tokens
        # n tokens have n - 1 gaps between them.
        speed = f"{(tokens - 1) / (last - first):.1f} tokens/s" if last > first else ""
        print(f"{usage.prompt_tokens} + {tokens} tokens", speed, file=sys.stderr)
        print(f"first token after {first - start:.2f} s, {finish=}", file=sys.stderr)
    return None


if __name__ == "__main__":
    sys.exit(main())
