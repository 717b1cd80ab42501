"""Tiny random models with their processors, saved as folders: what --model takes, of every family.

The tokenizer is the tiny policy's, with each family's own special tokens; images come out at 28 to 56
pixels, whole or in tiles, as the family's processor makes them.
"""

import functools
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from model import image_only
from tiny import build_tiny_policy

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
PATCHES = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14}
SQUARE = {"height": 28, "width": 28}
CHAT = (
    "{% for message in messages %}{{ message['role'] }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %} {{ part['text'] }}{% endif %}{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
FAMILIES = (
    "llava_clip", "llava_siglip", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
    "idefics3", "smolvlm", "instructblip", "paligemma", "internvl",
)  # fmt: skip


def save_folder(family: str, folder: Path) -> str:
    """Save a tiny random model of a family with its processor.  Returns the folder's name."""
    torch.manual_seed(0)
    names = _special_tokens(family)
    tokenizer = _tokenizer(names)
    model, processor = _build(family, tokenizer)
    with torch.no_grad():  # a random head is nearly flat, which hides what is wrong before it
        model.get_output_embeddings().weight.mul_(12)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def _special_tokens(family: str) -> dict[str, str]:
    if family.startswith("qwen"):
        return {
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        }
    if family == "internvl":
        return {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
    if family in ("idefics3", "smolvlm"):
        return {
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        }
    if family == "instructblip":
        return {}  # its processor adds its own
    return {"image_token": "<image>", "video_token": "<video>"}


@functools.cache
def _backend() -> str:
    """The tiny policy's tokenizer as text: it is learnt from 2,000 sentences, once for all families."""
    return build_tiny_policy().tokenizer.backend_tokenizer.to_str()


def _tokenizer(names: dict[str, str]) -> hf.PreTrainedTokenizerFast:
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=names,
    )  # fmt: skip
    grid = [f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)]
    tokenizer.add_tokens(grid if "fake_image_token" in names else [])
    return tokenizer


def _build(family: str, tokenizer):
    token = tokenizer.convert_tokens_to_ids
    text = TEXT | {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    clip = hf.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE)
    siglip = hf.SiglipImageProcessorPil(size=SQUARE)
    if family in ("llava_clip", "llava_siglip"):
        how = {"vision_feature_select_strategy": "default" if family == "llava_clip" else "full"}
        tower = hf.CLIPVisionConfig if family == "llava_clip" else hf.SiglipVisionConfig
        config = hf.LlavaConfig(
            vision_config=tower(**TOWER), text_config=hf.Qwen2Config(**text), image_seq_length=4,
            image_token_index=token("<image>"), vision_feature_layer=-1, **how,
        )  # fmt: skip
        processor = hf.LlavaProcessor(
            clip if family == "llava_clip" else siglip, tokenizer, patch_size=14,
            num_additional_image_tokens=int(family == "llava_clip"), **how,
            chat_template=CHAT.replace("IMAGE", "<image>"),
        )  # fmt: skip
        return hf.LlavaForConditionalGeneration(config), processor
    if family == "llava_onevision":
        grid = [[28, 28], [28, 56], [56, 28], [56, 56]]
        config = hf.LlavaOnevisionConfig(
            vision_config=hf.SiglipVisionConfig(**TOWER), text_config=hf.Qwen2Config(**text),
            image_token_index=token("<image>"), video_token_index=token("<video>"),
            image_grid_pinpoints=grid, vision_feature_select_strategy="full",
        )  # fmt: skip
        pictures = hf.LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=grid)
        processor = image_only(hf.LlavaOnevisionProcessor)(
            pictures, tokenizer, num_image_tokens=4, vision_feature_select_strategy="full",
            chat_template=CHAT.replace("IMAGE", "<image>"),
        )  # fmt: skip
        return hf.LlavaOnevisionForConditionalGeneration(config), processor
    if family.startswith("qwen"):
        return _qwen(family, tokenizer, text)
    if family in ("idefics3", "smolvlm"):
        name = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[family]
        config = getattr(hf, f"{name}Config")(
            text_config=text | {"model_type": "llama"}, vision_config=TOWER,
            image_token_id=token("<image>"), scale_factor=2, pad_token_id=text["pad_token_id"],
        )  # fmt: skip
        pictures = hf.Idefics3ImageProcessorPil(
            size={"longest_edge": 56}, max_image_size={"longest_edge": 28}
        )
        processor = hf.Idefics3Processor(
            pictures, tokenizer, image_seq_len=1, chat_template=CHAT.replace("IMAGE", "<image>")
        )
        return getattr(hf, f"{name}ForConditionalGeneration")(config), processor
    if family == "instructblip":
        pictures = hf.BlipImageProcessorPil(size=SQUARE)
        processor = hf.InstructBlipProcessor(
            pictures, tokenizer, _tokenizer({}), num_query_tokens=4
        )
        config = hf.InstructBlipConfig(
            vision_config=TOWER,
            qformer_config={
                "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 2, "intermediate_size": 48, "encoder_hidden_size": 32,
                "max_position_embeddings": 512,
            },
            text_config=text | {"model_type": "llama", "vocab_size": len(tokenizer)},
            num_query_tokens=4, image_token_index=token("<image>"),
        )  # fmt: skip
        model = hf.InstructBlipForConditionalGeneration(config)
        torch.nn.init.normal_(model.query_tokens)  # zeros at first, so that images would not matter
        for weight in model.vision_model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.05)
        return model, processor
    if family == "paligemma":
        siglip.image_seq_length = 4
        processor = hf.PaliGemmaProcessor(siglip, tokenizer)  # adds its own tokens
        text |= {"model_type": "gemma", "head_dim": 16, "vocab_size": len(tokenizer)}
        config = hf.PaliGemmaConfig(
            vision_config=TOWER | {"projection_dim": 64}, projection_dim=64, hidden_size=64,
            text_config=text, image_token_index=token("<image>"),
        )  # fmt: skip
        return hf.PaliGemmaForConditionalGeneration(config), processor
    if family == "internvl":
        config = hf.InternVLConfig(
            vision_config=TOWER | {"image_size": [28, 28], "patch_size": [14, 14]},
            text_config=text | {"model_type": "qwen2"}, image_seq_length=1,
            image_token_id=token("<IMG_CONTEXT>"),
        )  # fmt: skip
        pictures = hf.GotOcr2ImageProcessorPil(
            size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4
        )
        processor = image_only(hf.InternVLProcessor)(
            pictures, tokenizer, image_seq_length=1,
            chat_template=CHAT.replace("IMAGE", "<IMG_CONTEXT>\n"),
        )  # fmt: skip
        return hf.InternVLForConditionalGeneration(config), processor
    raise ValueError(f"no such family: {family}")


def _qwen(family: str, tokenizer, text: dict):
    token = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = dict(PATCHES)
    if family == "qwen2_vl":
        kind = "Qwen2VL"
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
        vision["patch_size"] = 14
    elif family == "qwen2_5_vl":
        kind = "Qwen2_5_VL"
        vision |= {"out_hidden_size": 64, "window_size": 56, "fullatt_block_indexes": [1]}
    else:
        kind = "Qwen3VL"
        rope["mrope_interleaved"] = True
        text = text | {"head_dim": 16}
        vision |= {
            "out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        }  # fmt: skip
    config = getattr(hf, f"{kind}Config")(
        text_config=text | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
    )  # fmt: skip
    pictures = hf.Qwen2VLImageProcessorPil(patch_size=14, min_pixels=28 * 28, max_pixels=56 * 84)
    template = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = image_only(PROCESSOR_MAPPING[type(config)])(
        pictures, tokenizer, chat_template=template
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config), processor
