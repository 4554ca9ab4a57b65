"""A tiny random-weight Llama model in GGUF: real in all but the sense of its words.

The text it generates is gibberish made of syllables ("zo mi kefu ..."), but the rest is
real: a SentencePiece tokenizer with byte fallback, a ChatML template with tools, an
end-of-turn token (id 3), <tool_call> and </tool_call> (ids 8 and 9) and tokens for
fill-in-the-middle.  The same arguments always give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float32]

CHATML = r"""
{%- if tools -%}
{{- '<|im_start|>system\n<tools>\n' -}}
{%- for tool in tools -%}{{- (tool | tojson) + '\n' -}}{%- endfor -%}
{{- '</tools><|im_end|>\n' -}}
{%- endif -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\n' + (m.content or '') -}}
{%- for call in m.tool_calls or [] -%}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' -}}
{{- (call.function.arguments | tojson) + '}</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
UNK, BOS, EOT = 0, 1, 3  # token ids, fixed by the order in _vocabulary()
CONTROL = (
    "<s>",
    "</s>",
    "<|im_end|>",
    "<|im_start|>",
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
)
HEADS, KV_HEADS = 4, 2
SEED = 1
BIAS_LANE = 4.0  # value held in lane 0 of every hidden state, see _tensors()
NEVER = -40.0  # logit of a token that only a grammar or a logit_bias calls up


def write_tiny_gguf(
    path: Path,
    *,
    layers: int = 2,
    dim: int = 64,
    mean_length: float = 0,
    embedding: bool = False,
    ctx: int = 4096,
    name: str = "tiny-random",
) -> Path:
    """Write a model and return its path.

    Args:
        layers: More of them make it slower: 400 with dim 32 give about 100 tokens/s.
        dim: Hidden size, a multiple of 8.
        mean_length: Replies end by themselves after about as many tokens; 0: never.
        embedding: Mean pooling and no chat template, for `llama-server --embedding`.
        ctx: Context that the model claims to be trained for.
        name: The name in the file; a server goes by its `--alias`.
    """
    if dim % (2 * HEADS):
        raise ValueError(f"dim = {dim}: must be a multiple of {2 * HEADS}")
    texts, scores, types = _vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(len(texts))
    writer.add_context_length(ctx)
    writer.add_embedding_length(dim)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(dim * 2)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(dim // HEADS)
    writer.add_tokenizer_model("llama")  # SentencePiece
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(UNK)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOT)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    if embedding:
        writer.add_pooling_type(gguf.PoolingType.MEAN)
    else:
        writer.add_chat_template(CHATML)
    bias = _token_bias(types, mean_length)
    for tensor_name, tensor in _tensors(layers, dim, bias):
        writer.add_tensor(tensor_name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _vocabulary() -> tuple[list[str], list[float], list[gguf.TokenType]]:
    """Return texts, scores and types: specials, all 256 bytes, then syllables."""
    kind = gguf.TokenType
    rows = [("<unk>", 0.0, kind.UNKNOWN)]
    rows += [(text, 0.0, kind.CONTROL) for text in CONTROL]
    rows += [(text, 0.0, kind.USER_DEFINED) for text in ("<tool_call>", "</tool_call>")]
    rows += [(f"<0x{byte:02X}>", 0.0, kind.BYTE) for byte in range(256)]
    syllables = [c + v for c in "bdfghjklmnprstvwyz" for v in "aeiou"]
    words = [*syllables, *("\u2581" + syllable for syllable in syllables), ".", ","]
    # SentencePiece merges the pair with the highest score first.
    rows += [(text, -float(rank), kind.NORMAL) for rank, text in enumerate(words)]
    texts, scores, types = zip(*rows, strict=True)
    return list(texts), list(scores), list(types)


def _token_bias(types: list[gguf.TokenType], mean_length: float) -> NDArray[np.float64]:
    """Favour words, and end-of-turn now and then; the rest comes never by itself.

    llama-server answers 500 to the raw bytes that random weights would emit.
    """
    normal = gguf.TokenType.NORMAL
    bias = np.array([0.0 if kind == normal else NEVER for kind in types])
    if mean_length > 0:
        words = int((bias == 0.0).sum())
        # Tuned to llama-server's default sampling (top-k 40, temperature 0.8).
        bias[EOT] = 0.8 * math.log(0.6 * words / mean_length)
    return bias


def _tensors(
    layers: int, dim: int, bias: NDArray[np.float64]
) -> Iterator[tuple[str, Weights]]:
    """Yield all weights; their order is part of the file and of the random numbers.

    Lane 0 of the hidden state is a constant: every embedding sets it and no layer
    writes to it, so the first column of the output matrix acts as a bias per token,
    which the Llama architecture does not have.
    """
    rng = np.random.default_rng(SEED)
    ffn, vocab = dim * 2, len(bias)
    kv_dim = dim // HEADS * KV_HEADS

    def matrix(rows: int, cols: int) -> Weights:
        return rng.normal(0.0, 1.0 / math.sqrt(cols), (rows, cols)).astype(np.float32)

    def residual(rows: int, cols: int) -> Weights:  # its result is added to the state
        weight: Weights = matrix(rows, cols) / math.sqrt(2 * layers)
        weight[0] = 0.0
        return weight

    ones = np.ones(dim, dtype=np.float32)
    embedding = rng.normal(0.0, 1.0, (vocab, dim)).astype(np.float32)
    embedding[:, 0] = BIAS_LANE
    output = matrix(vocab, dim)
    # The final norm divides by the RMS of the hidden state (other lanes: about 1 each).
    normed_lane = BIAS_LANE / math.sqrt(1.0 + BIAS_LANE**2 / dim)
    output[:, 0] = bias / normed_lane

    yield "token_embd.weight", embedding
    for n in range(layers):
        yield f"blk.{n}.attn_norm.weight", ones
        yield f"blk.{n}.attn_q.weight", matrix(dim, dim)
        yield f"blk.{n}.attn_k.weight", matrix(kv_dim, dim)
        yield f"blk.{n}.attn_v.weight", matrix(kv_dim, dim)
        yield f"blk.{n}.attn_output.weight", residual(dim, dim)
        yield f"blk.{n}.ffn_norm.weight", ones
        yield f"blk.{n}.ffn_gate.weight", matrix(ffn, dim)
        yield f"blk.{n}.ffn_up.weight", matrix(ffn, dim)
        yield f"blk.{n}.ffn_down.weight", residual(dim, ffn)
    yield "output_norm.weight", ones
    yield "output.weight", output
