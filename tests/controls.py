"""Controls that several tests use."""

from collections import Counter


class Identity:
    """All seven stages, each passing on what it gets, and a count of the calls."""

    def __init__(self):
        self.calls = Counter()

    def hidden(self, site, x):
        return self.passed("hidden", site, x)

    def context(self, site, x, ctx):
        return self.passed("context", site, ctx)

    def qkv(self, site, q, k, v):
        return self.passed("qkv", site, (q, k, v))

    def logits(self, site, s):
        return self.passed("logits", site, s)

    def weights(self, site, p):
        return self.passed("weights", site, p)

    def heads(self, site, o, q):
        return self.passed("heads", site, o)

    def output(self, site, y):
        return self.passed("output", site, y)

    def passed(self, stage, site, value):
        self.calls[stage, site] += 1
        return value


class Record:
    """The residual stream at the entry of each layer, and the attention weights."""

    def __init__(self):
        self.states, self.maps = [], []

    def hidden(self, site, x):
        self.states.append(x)

    def weights(self, site, p):
        self.maps.append(p)
