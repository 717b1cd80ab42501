"""Tiny random models of several families, with one prompt each: the engine must serve all exactly.

Facts about the configurations: see the classes' documentation in transformers. `build(family)` returns
the model and the inputs of one prompt with one image, as the family's processor would make them.
"""

import torch
import transformers as hf

VOCABULARY, IMAGE, VIDEO, VISION_START, VISION_END, PAD, BOS, EOS = 160, 7, 8, 9, 10, 0, 1, 2
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
FAMILIES = ("llava", "qwen2_5_vl", "idefics3", "instructblip")


def _ids(images: int, before=(BOS, 20, 21), after=(30, 31, 32, 33)) -> torch.Tensor:
    return torch.tensor([[*before, *[IMAGE] * images, *after]])


def build(family: str):
    """(model in eval mode, inputs)."""
    torch.manual_seed(0)
    if family == "llava":
        config = hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**TOWER, projection_dim=32),
            text_config=hf.LlamaConfig(**TEXT),
            image_token_index=IMAGE,
            image_seq_length=4,
        )
        model = hf.LlavaForConditionalGeneration(config)
        inputs = {"input_ids": _ids(4), "pixel_values": torch.rand(1, 3, 28, 28)}
    elif family == "qwen2_5_vl":
        rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
        config = hf.Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_parameters": rope},
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": 64,
                "patch_size": 14,
                "window_size": 56,
                "fullatt_block_indexes": [1],
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=VISION_START,
            vision_end_token_id=VISION_END,
        )
        model = hf.Qwen2_5_VLForConditionalGeneration(config)
        ids = _ids(6, before=(BOS, 20, VISION_START), after=(VISION_END, 30, 31, 32))
        inputs = {
            "input_ids": ids,
            "pixel_values": torch.rand(24, 3 * 2 * 14 * 14),
            "image_grid_thw": torch.tensor([[1, 4, 6]]),
            "mm_token_type_ids": (ids == IMAGE).int(),
        }
    elif family == "idefics3":
        config = hf.Idefics3Config(
            text_config={**TEXT, "model_type": "llama"},
            vision_config={**TOWER, "image_size": 56},
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=PAD,
        )
        model = hf.Idefics3ForConditionalGeneration(config)
        inputs = {
            "input_ids": _ids(4),
            "pixel_values": torch.rand(1, 1, 3, 56, 56),
            "pixel_attention_mask": torch.ones(1, 1, 56, 56, dtype=torch.bool),
        }
    elif family == "instructblip":
        config = hf.InstructBlipConfig(
            vision_config=TOWER,
            qformer_config={
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 48,
                "encoder_hidden_size": 32,
                "max_position_embeddings": 64,
            },
            text_config={**TEXT, "model_type": "llama"},
            num_query_tokens=4,
            image_token_index=IMAGE,
        )
        model = hf.InstructBlipForConditionalGeneration(config)
        torch.nn.init.normal_(model.query_tokens)  # zeros at first, so that images would not matter
        for weight in model.vision_model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.05)
        inputs = {
            "input_ids": _ids(4),
            "pixel_values": torch.rand(1, 3, 28, 28),
            "qformer_input_ids": torch.tensor([[5, 30, 31]]),
        }
    else:
        raise ValueError(f"no such family: {family}")
    # A random head is nearly flat; a sharper one makes draws stay on a trajectory now and then.
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(12)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return model.eval(), inputs
