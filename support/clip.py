"""CLIP scores: images, texts -> cosines."""
from pathlib import Path

import torch
import torch.nn.functional as F

from drr import UserError


class Clip:
    """A CLIP model (Radford et al. 2021) in a local folder, as Hugging Face's `transformers` keeps it. The
    papers' score is the plain mean cosine of each picture and its own caption, by ViT-B/32."""

    def __init__(self, folder, device):
        try:
            from transformers import AutoTokenizer, CLIPModel
        except ImportError as error:
            raise UserError(f"CLIP needs `transformers` ({error}): pip install -r requirements-text.txt."
                            ) from None
        try:
            if not (Path(folder) / "config.json").is_file():
                raise ValueError("it holds no config.json")
            options = {"local_files_only": True, "output_loading_info": True}
            self.model, found = CLIPModel.from_pretrained(folder, **options)
            # What a file lacks would be random.
            if found["missing_keys"] or found["mismatched_keys"]:
                raise ValueError("weights are missing or of another shape")
            self.model.to(device, torch.float32).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:                           # transformers raises nearly anything
            raise UserError(f"{folder} is no CLIP model ({type(error).__name__}: {error}); expected a folder "
                            "with config.json, model.safetensors and a tokenizer.") from None
        vision = self.model.config.vision_config
        self.size = vision.image_size
        self.name = f"CLIP {folder} (patches of {vision.patch_size}, {self.size}x{self.size}, bicubic)"

    @torch.inference_mode()
    def score(self, images, texts):
        """Cosines (B,) of square images (B, 3, S, S) in [-1, 1] and their texts."""
        device = self.model.device
        x = F.interpolate(images.to(device).float(), (self.size, self.size), mode="bicubic", antialias=True)
        x = x.clamp(-1, 1).add(1).mul(127.5).round().div(255)          # as 8-bit pictures, in [0, 1]
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], device=device).view(3, 1, 1)
        deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711], device=device).view(3, 1, 1)
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt",
                                max_length=self.model.config.text_config.max_position_embeddings).to(device)
        out = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask,
                         pixel_values=(x - mean) / deviation)
        return F.cosine_similarity(out.image_embeds, out.text_embeds).float().cpu()
