"""A prompt over one or more ranks.

python examples/generate.py
torchrun --nproc-per-node 2 examples/generate.py
"""

from __future__ import annotations

import ds_cp

engine = ds_cp.init_inference(config="configs/quickstart.json")  # every rank calls it
params = ds_cp.SamplingParams(max_tokens=16, temperature=0.0)
outputs = engine.generate(["The capital of France is", "Gravity is"], params)
if engine.is_driver:
    for output in outputs:
        print(output.prompt + output.outputs[0].text)
engine.shutdown()
