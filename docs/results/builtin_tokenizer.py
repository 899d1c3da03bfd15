"""How the built-in tokenizer was made: byte-level BPE trained on generated problems.

    python docs/results/builtin_tokenizer.py     writes kava_jax/assets/demo_teacher/tokenizer.json

Every digit is a token of its own and all 256 bytes are among the 512 ids, so any text comes back
unchanged. A test makes it again and compares the two.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kava_jax.data.problems import word_problems

WRITTEN = Path(__file__).resolve().parents[2] / "kava_jax/assets/demo_teacher/tokenizer.json"
EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY = 512
PROBLEMS = 2000
# The problems alone run out of merges near 440 ids; common English words fill the rest.
ENGLISH = (
    "The people and the children in that house were there with all of their things from the time "
    "before, but they would not have been able to make them into what she wanted for her other "
    "friends. When he said this, they could see how good it is to be one of those who know about "
    "some of the little animals which live here. You can think of your own words because you may "
    "like to work, play, look, come and go out again after another day, down where no one is."
)


def made() -> Tokenizer:
    """Train it, from problems of the training split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[EOS, PAD],
        show_progress=False,
    )
    problems = word_problems("train", seed=0, rows=PROBLEMS)
    texts = [f"Question: {example.prompt}\nAnswer: {example.answer}" for example in problems]
    tokenizer.train_from_iterator([*texts, ENGLISH], trainer)
    # As transformers wraps it: that is what is read and written from here on.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD
    ).backend_tokenizer


if __name__ == "__main__":
    made().save(str(WRITTEN))
