"""loading.md: what works on a loaded model in which container, from loading.yaml, which a test goes through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

COLUMNS = {
    "bitroute": "bitroute", "encoder": "bitroute, text encoder", "torchao": "torchao",
    "bitsandbytes": "bitsandbytes", "quanto": "quanto",
}  # fmt: skip
HEAD = """\
`from_pretrained` of diffusers or transformers loads what bitroute writes. A folder in bitroute's own container, and
only that, needs `import bitroute` first:

```python
import bitroute
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("./flux-mixed", dtype=torch.bfloat16)
pipe.enable_model_cpu_offload()
```

- **Opening reads no weight.** The files are mapped; a stored tensor is a view of its file until it moves to a device.
  There is no second copy, and nothing is decoded. With `disable_mmap=True` diffusers reads each file whole and copies
  its tensors.
- **Stored tensors keep their dtype**, whatever the model is loaded in or moved to: a scale in another dtype is another
  weight.
- **A LoRA** works on quantized layers as it does on plain ones, also several with weights of their own:

  ```python
  pipe.load_lora_weights("./style.safetensors", adapter_name="style")
  pipe.set_adapters(["style"], [0.8])
  ```

  It stays beside the weight. Fusing it would round the weight a second time, so that is refused; fuse it before the
  conversion, which rounds once (`fuse_loras:` in the [recipe](recipes.md)), or call `pipe.transformer.dequantize()`
  first. What PEFT fused before it came to the first quantized layer stays fused, and so does the scale that it was
  told: after a refusal load the model again. A LoRA needs `pip install peft`, which does not know quantized
  convolutions: it refuses to adapt those. Layers with quantized activations (`activations:`) pass no gradient on.
  `unload_lora_weights()` before `save_pretrained`: with a LoRA beside them the layers are saved under PEFT's names,
  which no loader opens, of plain diffusers neither.
- **A text encoder in a torchao folder cannot be saved again** (transformers 5.23 raises NotImplementedError), so
  neither can the pipeline with it; `container: bitroute` can.
- **On a small GPU** groups of layers can wait in memory:

  ```python
  cuda = torch.device("cuda")
  pipe.transformer.enable_group_offload(onload_device=cuda, offload_type="leaf_level", use_stream=True)
  ```

## What works

"works" means that the model computes the same numbers as before, to the last bit. With a LoRA it means the effect that
the LoRA has on the original, up to the rounding of the weights; where weights are decoded for good, the same numbers up
to the rounding of sums. The columns are containers: bitroute's own for a diffusers model and for a transformers text
encoder, and the folders of the libraries, whose limits are theirs. A test repeats every cell without a star.
"""
FOOT = """\
\\* Seen once, not repeated by a test.

Not run, because there was no GPU: whatever needs one. Offloading was run from the CPU to the CPU, by the functions of
accelerate and diffusers that the methods of a pipeline call. Streams (`use_stream=True`), `device_map="balanced"`,
several GPUs were not run. Of `torch.compile` graphs were run, not generated code, which rounds otherwise (0.5 %, as
that of plain bf16).
"""


def loading_page(note: str) -> str:
    table = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    rows = [f"| {row['use']} | {' | '.join(_words(row['cells'], key) for key in COLUMNS)} |" for row in table["uses"]]
    head = f"| | {' | '.join(COLUMNS.values())} |\n|---|{'---|' * len(COLUMNS)}"
    seen = f"Seen with {table['versions']}."
    return "\n".join(["# Loading and using a checkpoint\n", note, HEAD, head, *rows, "", FOOT, seen, ""])


def repeated(container: str, cell: Any) -> bool:
    """Whether a test does it: what ends the process it cannot, and what slow libraries do well it need not."""
    return "crashes" not in cell and (container not in ("bitsandbytes", "quanto") or cell != "works")


def _words(cells: dict[str, Any], container: str) -> str:
    cell = cells.get(container)
    if cell is None:
        return ""
    star = "" if repeated(container, cell) else " \\*"
    if cell == "works":
        return cell + star
    (kind, words), *then = cell.items()
    said = {
        "refuses": f"refuses: “{words}”",
        "fails": f"fails: “{words}”",
        "wrong": f"**wrong**: {words}",
        "crashes": f"**crashes**: {words}",
    }
    return said[kind] + "".join(f", and {what}" for _, what in then) + star
