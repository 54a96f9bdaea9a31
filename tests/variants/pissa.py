"""PiSSA (arXiv 2404.02948) as a layer: the factors start with the weight's largest singular directions."""

import torch

from loralib.layers import LoRALinear


class PiSSALinear(LoRALinear):
    """y = x (W - s B0 A0)^T + b + s x A^T B^T, where s B0 A0 is the best approximation of rank r of W (eq. 2 to 4).

    The frozen weight is the rest of W, and A and B start at A0 and B0, so a fresh layer equals the one it replaces.
    """

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        u, s, vh = torch.linalg.svd(self.weight.float(), full_matrices=False)
        root = (s[: self.r] / self.scaling).sqrt()
        self.lora_A.copy_(root.unsqueeze(1) * vh[: self.r])
        self.lora_B.copy_(u[:, : self.r] * root)
        self.weight -= self.delta_weight()
