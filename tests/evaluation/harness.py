"""Models and tasks for lm-evaluation-harness: a Hugging Face folder, and golden tasks on files of their own."""

import os
import shutil
from pathlib import Path

import torch

from tests.train.runs import ROOT

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

GOLDEN = ROOT / "tests/golden/lm_eval_tasks"
GOLDEN_TASKS = ["bts_local_mc", "bts_local_ppl", "bts_local_gen"]
LOCAL = ROOT / "examples/tasks/local"


def golden_tasks(folder: Path) -> Path:
    """The golden tasks, their data beside them."""
    shutil.copytree(GOLDEN, folder)
    for file in folder.glob("*.yaml"):
        file.write_text(file.read_text().replace("DATA_DIR", str(folder)))
    return folder


def make_hf(folder: Path, seed: int = 0) -> Path:
    """A random Llama with a byte-level BPE tokenizer that begins every text with a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [file.read_text() for file in (*LOCAL.glob("*.jsonl"), *LOCAL.glob("*.yaml"))]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=tokenizer.token_to_id("<s>"),
        eos_token_id=tokenizer.token_to_id("</s>"),
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # it never writes its special tokens, whose text the harness' own model leaves out
        model.lm_head.weight[:2] = 0
    model.save_pretrained(folder)
    return folder
