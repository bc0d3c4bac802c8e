"""What torch and transformers offer for making a Hugging Face folder of a DCP checkpoint.

    python -m bench.dcp_to_hf SOURCE OUTPUT LAYERS

``dcp.load`` into the whole model, then ``save_pretrained``.
"""

from __future__ import annotations

import sys
import warnings


def main() -> None:
    source, output, layers = sys.argv[1:]
    warnings.simplefilter("ignore")
    import torch
    from torch.distributed.checkpoint.state_dict_loader import load

    from bench.dcp_jobs import MODELS, config_of

    with torch.device("meta"):
        model = MODELS.from_config(config_of(int(layers)))
    model = model.float().to_empty(device="cpu")
    load({"model": model.state_dict()}, checkpoint_id=source, no_dist=True)
    model.save_pretrained(output)


if __name__ == "__main__":
    main()
