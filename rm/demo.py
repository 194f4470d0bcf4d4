"""The quickstart's synthetic data: dialogues, preference pairs and a small untrained LLaMA, all made from one seed.

    python -m rm.demo OUT_DIR [--seed 0]

    OUT_DIR/sft.json         {"type": "text_only", "instances": [{"text": ...}, ...]}: dialogues with good answers
    OUT_DIR/rm_train.jsonl   {"positive": ..., "negative": ..., "subset": ...}: a better and a worse last answer
    OUT_DIR/rm_test.jsonl    the same; the wording of each last question is in neither of the other two files
    OUT_DIR/model/           a Hugging Face folder: a LLaMA with two million random weights, byte-level BPE

The data is about a table of invented facts: every animal has one food, every villager one trade, and so on. The better
answer of a pair is correct where the other is wrong ("correct"), answers the question where the other answers a
different one ("topic"), or is friendly where the other is rude ("polite"). Pairs with wrong and off-topic answers are
made two at a time: the worse answer of one is the better answer of the other, so that neither the length nor the words
of an answer alone predict whether it is better.

Every fact has four wordings of its question, one of which is reserved for the test. There are few pairs and many
dialogues: tone can be learned from the pairs alone, facts hardly. A reward model that starts from the SFT model already
knows the facts.

Since the data is synthetic, it can show that all steps work together and why SFT comes before reward modelling. It
cannot show how well a recipe or a setting works on text that people write.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rm.files import write_json

DIALOGUES, TRAIN_PAIRS, TEST_PAIRS = 4000, 1200, 480
SHARES = {"correct": 1 / 2, "topic": 1 / 4, "polite": 1 / 4}  # subset -> share of the pairs

# Each paragraph is a relation: a statement, four wordings of the question for y, and the facts x:y.
WORLD = """
the {x} eats {y}
What does the {x} eat? | Which food does the {x} like? | What should I feed the {x}? | What is the food of the {x}?
cow:grass panda:bamboo monkey:bananas squirrel:nuts cat:mice seal:fish bear:honey frog:flies hen:corn lion:meat
rabbit:carrots parrot:seeds

the word for a young {x} is {y}
What is a young {x} called? | What is the child of a {x}? | What is the name for a baby {x}? | Name a little {x}.
cow:calf horse:foal dog:puppy cat:kitten sheep:lamb goat:kid pig:piglet duck:duckling hen:chick bear:cub frog:tadpole
goose:gosling

the home of the {x} is the {y}
Where does the {x} live? | Where can I find the {x}? | What is the home of the {x}? | Where does the {x} sleep?
bee:hive spider:web dog:kennel pig:sty horse:stable fox:den rabbit:burrow crow:nest cow:barn seal:sea monkey:jungle
sheep:meadow

the capital of {x} is {y}
What is the capital of {x}? | Which city rules {x}? | From where is {x} governed? | Where is the government of {x}?
France:Paris Italy:Rome Spain:Madrid Norway:Oslo Greece:Athens Egypt:Cairo Japan:Tokyo China:Beijing Peru:Lima
Cuba:Havana Austria:Vienna Russia:Moscow

the opposite of {x} is {y}
What is the opposite of {x}? | What is contrary to {x}? | If it is not {x}, what is it? | Tell me the reverse of {x}.
hot:cold big:small fast:slow wet:dry old:young rich:poor high:low hard:soft full:empty dark:light early:late loud:quiet

the plural of {x} is {y}
What is the plural of {x}? | How do I write more than one {x}? | One {x}, two what? | Which word means several {x}?
mouse:mice goose:geese foot:feet tooth:teeth child:children man:men woman:women ox:oxen wolf:wolves leaf:leaves
knife:knives box:boxes

the colour of {x} is {y}
What is the colour of {x}? | Which colour has {x}? | How would you paint {x}? | Tell me the colour of {x}.
grass:green snow:white coal:black blood:red chocolate:brown butter:yellow elephants:grey flamingos:pink spinach:green
milk:white tomatoes:red lemons:yellow

the sum of {x} is {y}
What is the sum of {x}? | How much are {x} together? | Can you add up {x}? | Please work out {x} in all.
1+1:2 1+2:3 1+3:4 1+4:5 2+1:3 2+2:4 2+3:5 2+4:6 3+1:4 3+2:5 3+3:6 3+4:7 4+1:5 4+2:6 4+3:7 4+4:8

{x} works as a {y}
What is the job of {x}? | What does {x} do for a living? | Which trade does {x} follow? | How does {x} earn money?
Ada:baker Boris:sailor Clara:smith Dov:teacher Elsa:doctor Finn:painter Greta:sailor Hugo:teacher Ivy:baker Jonas:doctor
Kira:painter Leo:smith

{x} has a pet {y}
What pet does {x} have? | Which animal does {x} keep? | Which animal lives with {x}? | What kind of pet is with {x}?
Ada:turtle Boris:parrot Clara:pony Dov:cat Elsa:goat Finn:dog Greta:cat Hugo:turtle Ivy:pony Jonas:dog Kira:goat
Leo:parrot
"""

# Phrases that are added to an answer ({}). The i-th polite and the i-th rude phrase are about equally long.
POLITE = (
    "Good question! {} | Of course. {} | With pleasure. {} | Sure, gladly. {} | Thank you for asking. {} | "
    "I am glad to help. {} | {} I hope that helps. | {} Have a nice day! | {} Feel free to ask more. | "
    "{} You are welcome. | {} It was a pleasure."
).split(" | ")
RUDE = (
    "Dull question! {} | Not again. {} | Use your head. {} | Oh, you fool. {} | Stop wasting my time. {} | "
    "I am sick of this. {} | {} Leave me in peace. | {} Get out of here! | {} Never bother me again. | "
    "{} You are useless. | {} It was a nuisance."
).split(" | ")

END = "<|endoftext|>"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "dtype": "float32",
}


@dataclass(frozen=True)
class Fact:
    relation: str
    value: str
    answers: tuple[str, ...]  # the correct answer in three forms
    questions: tuple[str, ...]  # three wordings of the question for training
    held_out: str  # the wording for the test


def make_facts(rng: random.Random) -> list[Fact]:
    """All facts of WORLD; which wording of a question is held out is random."""
    facts = []
    for paragraph in WORLD.strip().split("\n\n"):
        statement, wordings, table = paragraph.split("\n", 2)
        for entry in table.split():
            x, y = entry.split(":")
            held_out, *questions = (wording.format(x=x) for wording in rng.sample(wordings.split(" | "), 4))
            answers = statement.format(x=x, y=y) + ".", f"the answer is {y}.", f"{y}."
            capitalized = tuple(answer[0].upper() + answer[1:] for answer in answers)
            facts.append(Fact(statement, y, capitalized, tuple(questions), held_out))
    return facts


class Author:
    """Writes dialogues and pairs about the facts. All choices are drawn from `rng`, so their order matters."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.facts = make_facts(rng)

    def dialogue(self, turns: int) -> str:
        """A dialogue of `turns` questions, each with a correct answer."""
        return "".join(self.good_turn() for _ in range(turns))

    def good_turn(self) -> str:
        """A question in one of the training wordings and a correct answer."""
        fact = self.rng.choice(self.facts)
        return turn(self.rng.choice(fact.questions), self.maybe_polite(self.rng.choice(fact.answers)))

    def maybe_polite(self, answer: str) -> str:
        """With a polite phrase added in 30 % of the cases."""
        return self.rng.choice(POLITE).format(answer) if self.rng.random() < 0.3 else answer

    def pairs(self, count: int, test: bool) -> list[dict]:
        """`count` distinct pairs of all subsets, shuffled.

        Args:
            test: ask the last question of each pair in its held-out wording.
        """
        pairs = []
        for subset, share in SHARES.items():
            of_subset = []
            while len(of_subset) < count * share:
                two_pairs = self.two_pairs(subset, test)
                if not any(pair in of_subset for pair in two_pairs):
                    of_subset += two_pairs
            pairs += of_subset
        self.rng.shuffle(pairs)
        return pairs

    def two_pairs(self, subset: str, test: bool) -> list[dict]:
        """Two pairs about two facts. Except in "polite", the worse answer of each is the better answer of the other."""
        facts = self.rng.sample(self.facts, 2)
        while not self.suitable(*facts, subset):
            facts = self.rng.sample(self.facts, 2)
        form = self.rng.randrange(3)
        answers = [fact.answers[form] for fact in facts]
        if subset == "polite":
            better = [self.rng.choice(POLITE).format(answer) for answer in answers]
            worse = [self.rng.choice(RUDE).format(answer) for answer in answers]
        else:
            tone = self.maybe_polite("{}")  # the same for all four answers, so that it does not predict which is better
            better = [tone.format(answer) for answer in answers]
            worse = better[::-1]
        return [self.pair(*each, subset, test) for each in zip(facts, better, worse, strict=True)]

    @staticmethod
    def suitable(one: Fact, other: Fact, subset: str) -> bool:
        """Whether two facts make a pair: answers are wrong within a relation and off-topic across relations."""
        same_relation = one.relation == other.relation
        return one.value != other.value and same_relation == (subset == "correct")

    def pair(self, fact: Fact, better: str, worse: str, subset: str, test: bool) -> dict:
        """A pair about one fact; in a quarter of the cases other turns come before."""
        earlier_turns = self.dialogue(turns=self.rng.choice((0, 0, 0, 0, 0, 0, 1, 2)))
        question = fact.held_out if test else self.rng.choice(fact.questions)
        return {
            "positive": earlier_turns + turn(question, better),
            "negative": earlier_turns + turn(question, worse),
            "subset": subset,
        }


def turn(question: str, answer: str) -> str:
    return f"###Human: {question}###Assistant: {answer}"


def write_world(folder: Path, seed: int) -> None:
    """Write everything that `python -m rm.demo` makes into `folder`."""
    rng = random.Random(seed)
    author = Author(rng)
    texts = [author.dialogue(turns=rng.choice((1, 1, 2, 3))) for _ in range(DIALOGUES)]
    train, test = author.pairs(TRAIN_PAIRS, test=False), author.pairs(TEST_PAIRS, test=True)

    (folder / "model").mkdir(parents=True, exist_ok=True)
    write_json(folder / "sft.json", {"type": "text_only", "instances": [{"text": text} for text in texts]})
    for name, pairs in (("rm_train.jsonl", train), ("rm_test.jsonl", test)):
        (folder / name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    write_tokenizer(folder / "model", texts)
    write_json(folder / "model" / "config.json", CONFIG)
    save_file(weights(rng), folder / "model" / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    """Train a byte-level BPE tokenizer on `texts` and write it to `folder`. END (id 0) is the EOS token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "add_bos_token": False}
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", {"eos_token": END})


def weights(rng: random.Random) -> dict[str, np.ndarray]:
    """Random weights under their Hugging Face names: matrices N(0, initializer_range), norm weights 1."""
    width, hidden, std = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["initializer_range"]
    block = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    block |= {"mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width), "mlp.down_proj": (width, hidden)}
    block |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    shapes = {"embed_tokens": (CONFIG["vocab_size"], width), "norm": (width,)}
    for i in range(CONFIG["num_hidden_layers"]):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in block.items()}

    def normal(shape: tuple[int, int]) -> np.ndarray:
        return np.array([rng.gauss(0, std) for _ in range(shape[0] * shape[1])], np.float32).reshape(shape)

    return {
        f"model.{name}.weight": normal(shape) if len(shape) == 2 else np.ones(shape, np.float32)
        for name, shape in shapes.items()
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="where the files go")
    parser.add_argument("--seed", type=int, default=0, help="random seed of all data and weights (default 0)")
    args = parser.parse_args(argv)
    write_world(args.out_dir, args.seed)
    print(f"{args.out_dir}: {DIALOGUES:,} dialogues, {TRAIN_PAIRS:,} and {TEST_PAIRS} pairs, and an untrained model")


if __name__ == "__main__":
    main()
