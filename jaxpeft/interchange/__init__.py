"""Hugging Face PEFT adapters, written and read: the layout of peft 0.21.2, without importing it.

    save_peft(folder, delta, method, model, params)      # adapter_config.json and adapter_model.safetensors
    delta, method, extra = load_peft(folder, model, params)

| here | there |
|---|---|
| `lora` (rank and alpha by pattern, rsLoRA), `dora` | LORA, on linear layers, Conv1D, embeddings, convolutions |
| `ia3` | IA3, on linear layers |
| `poly`, `mhr` | POLY, on linear layers |
| `prompt_tuning` | PROMPT_TUNING |
| `prefix_tuning`, its network folded | PREFIX_TUNING; read back as `mlp=0` |
| `head`, `full`, `bitfit` in a chain with one of these | modules_to_save; adapted layers' biases as `lora_only` |

What both libraries compute is equal in evaluation, or the adapter is refused with the reason (`InterchangeError`):

- Methods that generate another's delta (MoS, a hypernetwork's adapters) are baked first: `bake(method, delta, task)`.
- PEFT 0.21.2 has no bottleneck adapters (`houlsby`, `pfeiffer`, `parallel`; its "adaption prompt" is another method):
  use `save_delta`.
- A word table that the head shares (GPT-2, T5, tied Llamas) is adapted with the head here, without it there.
- Prefixes: see `virtual` for positions, and why T5 has none.
- A classifier that pools otherwise than its Hugging Face class has no class there to run it. Its adapter is written all
  the same, after the names of the backbone.

Where a method merges there is a second way, which needs no PEFT at all: `save_model(folder, model,
adapted.merge(params, delta))`, read by `transformers` as any model.
"""

from jaxpeft.interchange.errors import InterchangeError
from jaxpeft.interchange.folder import load_peft, save_peft

__all__ = ["InterchangeError", "load_peft", "save_peft"]
