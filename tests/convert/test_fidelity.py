"""Weights held against their source: an interrupt does not wait for the end of a large one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT, pthread_kill
from threading import Timer, main_thread

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from bitroute import backends
from bitroute.convert.checkpoint import open_pipeline
from bitroute.convert.fidelity import compare_weights
from bitroute.convert.record import RecordedComponent, RecordedEntry

T5 = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 1, "num_heads": 4, "tie_word_embeddings": False}


def test_an_interrupt_does_not_wait_for_a_large_layer(source: Path, write_hollow: Callable[..., None]) -> None:
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(vocab_size=2**26, **T5)).bfloat16()  # 16 GiB of holes
    write_hollow(model, source / "text_encoder_2")
    pipeline = open_pipeline(str(source))
    component = pipeline.components["text_encoder_2"]
    stored = component.tensors["shared.weight"]
    tensors = {"weight": (stored.name, stored.spec)}
    entry = RecordedEntry(stored.name, "shared", backends.create("keep"), stored.spec, tensors)
    recorded = RecordedComponent(component, "plain", stored.spec.size_bytes, [entry])
    assert main_thread().ident
    start = time.monotonic()
    Timer(0.5, pthread_kill, (main_thread().ident, SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        compare_weights(recorded, pipeline, lambda done, what: None)
    assert time.monotonic() - start < 2.5
