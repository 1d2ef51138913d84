"""How often a vision-language model tells of what is not in the image.

POPE (Li et al. 2023)          is there a ...?    accuracy, precision, recall and F1 of "yes", share of "yes"
CHAIR (Rohrbach et al. 2018)   captions           CHAIR_i = mentions of absent objects / mentions
                                                  CHAIR_s = captions with such a mention / captions
                                                  recall  = objects mentioned / objects there
"""

import re
from collections.abc import Collection, Sequence

from sklearn.metrics import accuracy_score, precision_recall_fscore_support


def said_yes(answer: str) -> bool:
    """POPE's reading: no, if "no" or "not" is among the words of the first sentence."""
    return not {"no", "not"} & set(re.findall(r"\w+", answer.split(".")[0].lower()))


def pope(said: Sequence[bool], true: Sequence[bool]) -> dict[str, float]:
    """said, true: whether the answer is yes."""
    precision, recall, f1, _ = precision_recall_fscore_support(true, said, average="binary", zero_division=0.0)
    found = {"accuracy": accuracy_score(true, said), "precision": precision, "recall": recall, "f1": f1, "yes_rate": sum(said) / len(said)}
    return {name: float(value) for name, value in found.items()}


def chair(mentioned: Sequence[Sequence[str]], present: Sequence[Collection[str]]) -> dict[str, float]:
    """mentioned: the objects that each caption names, as often as it does. present: those in its image.

    A set of captions that mention nothing has chair_i 0. f1: of precision = 1 - chair_i and recall.
    """
    absent = [[name for name in names if name not in there] for names, there in zip(mentioned, present, strict=True)]
    mentions = sum(map(len, mentioned))
    chair_i = sum(map(len, absent)) / max(1, mentions)
    recall = sum(len(set(names) & set(there)) for names, there in zip(mentioned, present, strict=True)) / sum(map(len, present))
    return {
        "chair_s": sum(map(bool, absent)) / len(absent),
        "chair_i": chair_i,
        "recall": recall,
        "f1": 2 * (1 - chair_i) * recall / max(1 - chair_i + recall, 1e-12),
        "mentions": mentions / len(mentioned),
    }
