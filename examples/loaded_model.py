"""A decoder that you have loaded yourself gives the tokens of its own ``generate``.

python examples/loaded_model.py
mpirun -np 2 python examples/loaded_model.py
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ds_cp

torch.manual_seed(0)  # every rank makes the same weights
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=128, num_attention_heads=4, initializer_range=0.2, **sizes)
).eval()
prompt = list(range(1, 101))
want = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)

engine = ds_cp.init_inference(
    model, {"context_parallel": {"mode": "ring"}, "kv_cache": {"tokens_per_rank": 128}}
)
params = ds_cp.SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
outputs = engine.generate([prompt], params)
if engine.is_driver:
    tokens = list(outputs[0].outputs[0].token_ids)
    print("ds_cp:       ", tokens)
    print("transformers:", want[0, len(prompt) :].tolist())
    assert tokens == want[0, len(prompt) :].tolist()
engine.shutdown()
