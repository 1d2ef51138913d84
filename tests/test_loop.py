"""The training loop: resuming, stopping, accumulating, ranks, and what it says when something is wrong."""

import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from common import loop
from common.config import RunConfig
from common.data import Batches
from common.errors import Interrupted, UserError
from common.gpu import seeded
from tests import toy

ROOT = Path(__file__).parent.parent


def weights(out: Path) -> dict[str, torch.Tensor]:
    (path,) = (out / "toy/0").glob("*.safetensors")
    return load_file(path)


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "toy/0/metrics.jsonl").read_text().splitlines()]


def process(out: Path, *fields: str, **kwargs) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, "-m", "tests.toy", str(out), *fields], cwd=ROOT, env=env, text=True, stdout=-1, stderr=-1, **kwargs)


# ---- the arithmetic of a step ---------------------------------------------------------------------------------------------------------


def test_fit_is_adamw_with_a_warm_cosine(tmp_path):
    """Against the loop written out by hand with torch's own optimizer."""
    cfg = toy.config(tmp_path, steps=6, dropout=0.0, noise=0.0, warmup=0.5, lr=0.01, clip=0.5)
    model, batches = toy.model(cfg), Batches(toy.data(), cfg.batch, seed=0)
    matrices, vectors = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": cfg.weight_decay}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas)
    expected = []
    for step in range(6):
        x, y = toy.data()[batches.indices(step)]
        loss = nn.functional.cross_entropy(model(x), y) + 1e-3 * model.last.weight.square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        after = step + 1  # three steps up, then half a cosine over all six: timm's schedule with the warm-up as its prefix
        lr = cfg.lr * after / 3 if after < 3 else cfg.lr * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (after - 3) / 6)).item())
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    trained = toy.train(cfg)
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_parameters_have_their_own_learning_rate(tmp_path):
    """Adam's first step is lr · sign(gradient): a factor shows in it at once, and 0 freezes."""
    cfg = toy.config(tmp_path, steps=1, warmup=0.0, weight_decay=0.0, lr_min=1e-3)
    model = toy.model(cfg)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    scale = lambda name, parameter: {"first": 0.0, "blocks": 0.1}.get(name.split(".")[0], 1.0)
    loop.fit(model, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), Batches(toy.data(), 12, 0), cfg, "toy/0", scale)
    step = {n: (p - before[n]).abs().max().item() for n, p in model.named_parameters()}
    assert (
        step["first.weight"] == 0
        and step["blocks.0.weight"] == pytest.approx(1e-4, rel=0.01)
        and step["last.weight"] == pytest.approx(1e-3, rel=0.01)
    )


def test_accumulation_changes_nothing(tmp_path):
    toy.train(toy.config(tmp_path / "one", dropout=0.0, noise=0.0))
    toy.train(toy.config(tmp_path / "three", dropout=0.0, noise=0.0, accumulate=3))
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "one"), abs=1e-6)


def test_ema_is_what_is_evaluated(tmp_path):
    averaged = toy.train(toy.config(tmp_path / "ema", ema=0.5, steps=1))
    plain, start = toy.train(toy.config(tmp_path / "plain", steps=1)), toy.model(toy.config(tmp_path))
    for a, p, s in zip(averaged.parameters(), plain.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(a, (p + s) / 2)
    assert equal(weights(tmp_path / "ema"), averaged.state_dict())


def test_load_run_gives_the_trained_model(tmp_path):
    cfg = toy.config(tmp_path)
    trained = toy.train(cfg)
    loaded = loop.load_run(toy.Toy(16, 0.1), cfg, "toy/0")
    assert equal(loaded.state_dict(), trained.state_dict()) and not loaded.training


def test_tied_parameters_are_saved_once_and_loaded_twice(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x).relu())

    cfg, x = toy.config(tmp_path, steps=2), torch.randn(20, 8)
    trained = loop.fit(Tied(), lambda m, b: m(b[0]).square().mean(), Batches(TensorDataset(x), 12, 0), cfg, "toy/0")
    assert list(weights(tmp_path)) == ["embed.weight"]
    assert equal(loop.load_run(Tied(), cfg, "toy/0").state_dict(), trained.state_dict())


# ---- data -----------------------------------------------------------------------------------------------------------------------------


class Noisy(Dataset):
    """A dataset with a random transform."""

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return torch.tensor(i), torch.rand(()), torch.tensor(random.random())


def test_batches_visit_every_example_once_an_epoch():
    batches = Batches(TensorDataset(torch.arange(10)), 4, seed=3)
    seen = [i for step in range(5) for i in batches.indices(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


def test_a_batch_depends_on_seed_and_step_alone():
    first = list(Batches(Noisy(), 4, seed=3).stream(0, 6))
    torch.rand(1)
    later = list(Batches(Noisy(), 4, seed=3).stream(4, 6))
    for a, b in zip(first[4:], later, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
    other = next(Batches(Noisy(), 4, seed=4).stream(0, 6))
    assert not torch.equal(other[0][1], first[0][0][1])


def test_ranks_and_accumulation_share_one_batch():
    whole = next(Batches(Noisy(), 8, seed=3).stream(0, 1))[0]
    parts = [next(Batches(Noisy(), 8, seed=3).stream(0, 1, rank, 2, 2)) for rank in range(2)]
    joined = [torch.cat([parts[0][0][i], parts[1][0][i], parts[0][1][i], parts[1][1][i]]) for i in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(whole, joined, strict=True))


def test_workers_load_the_same_batches():
    here, there = (list(Batches(Noisy(), 4, seed=3, workers=workers).stream(1, 4)) for workers in (0, 2))
    for a, b in zip(here, there, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))


def test_seeded_leaves_the_generators_alone():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with seeded(1, 2):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with seeded(1, 2):
        assert torch.equal(torch.rand(2), inside)


def test_an_uneven_batch_is_refused(tmp_path):
    with pytest.raises(UserError, match="--batch 12 does not divide into 1 rank"):
        toy.train(toy.config(tmp_path, accumulate=5))


# ---- stopping and resuming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [None, 0.9])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, ema):
    toy.train(toy.config(tmp_path / "whole", ema=ema))
    cfg = toy.config(tmp_path / "cut", ema=ema)
    for stop in (7, 8, 19):
        with pytest.raises(Interrupted) as caught, loop.interrupt_at(stop):
            toy.train(cfg)
        assert caught.value.code == 130
    toy.train(cfg)
    assert equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_killed_process_is_continued_bit_for_bit(tmp_path):
    toy.train(toy.config(tmp_path / "whole", steps=400))
    metrics, kills = tmp_path / "cut/toy/0/metrics.jsonl", random.Random(time.time_ns())
    killed = process(tmp_path / "cut", "steps=400", "save_every=0.01")
    after = kills.randint(20, 300)
    while not metrics.exists() or metrics.read_text().count("\n") < after:
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.001)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    toy.train(toy.config(tmp_path / "cut", steps=400))
    assert equal(weights(tmp_path / "cut"), weights(tmp_path / "whole")), f"killed after step {after}"
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_kill_between_the_two_files_leaves_the_older_checkpoint(tmp_path):
    cfg = toy.config(tmp_path)
    with pytest.raises(Interrupted), loop.interrupt_at(6):
        toy.train(cfg)
    save_file({"first.weight": torch.zeros(1)}, tmp_path / "toy/0/step-00000010.safetensors")  # weights of step 10 without their .pt
    toy.train(cfg)
    toy.train(toy.config(tmp_path / "whole"))
    assert equal(weights(tmp_path), weights(tmp_path / "whole"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_stop(tmp_path, number, code):
    class Alarm(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, i):
            signal.raise_signal(number)
            return torch.ones(8)

    previous = signal.getsignal(number)
    with pytest.raises(Interrupted, match="stopped after step 1 of 5") as caught:
        loop.fit(nn.Linear(8, 1), lambda m, x: m(x).mean(), Batches(Alarm(), 1, 0), toy.config(tmp_path, steps=5, batch=1), "toy/0")
    assert caught.value.code == code and len(weights(tmp_path)) == 2
    assert signal.getsignal(number) is previous


def test_a_stop_at_the_last_step_ends_a_whole_run(tmp_path):
    cfg = toy.config(tmp_path / "stopped")
    with pytest.raises(Interrupted, match="stopped after step 20 of 20"), loop.interrupt_at(20):
        toy.train(cfg)
    toy.train(toy.config(tmp_path / "whole"))
    assert equal(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))
    loop.load_run(toy.Toy(16, 0.0), cfg, "toy/0")


def test_a_finished_run_is_not_trained_again(tmp_path):
    cfg = toy.config(tmp_path)
    first = toy.train(cfg)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "toy/0").glob("step-*"))
    again = toy.train(cfg)
    assert equal(first.state_dict(), again.state_dict())
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "toy/0").glob("step-*"))


def test_no_resume_starts_over(tmp_path):
    with pytest.raises(Interrupted), loop.interrupt_at(6):
        toy.train(toy.config(tmp_path, lr=1.0))
    toy.train(toy.config(tmp_path, resume=False))
    toy.train(toy.config(tmp_path / "other"))
    assert equal(weights(tmp_path), weights(tmp_path / "other"))


def _job(cfg: RunConfig, variant: str, fail: bool) -> None:
    if fail:
        raise UserError(f"{variant} cannot")
    (cfg.out / variant).write_text(f"{torch.get_num_threads()} {os.getpid()}")


def test_each_runs_jobs_in_processes_of_one_thread(tmp_path):
    loop.each(_job, [("a", False), ("b", False), ("c", False)], RunConfig(out=tmp_path, processes=2, device="cpu"))
    threads, pids = zip(*((tmp_path / name).read_text().split() for name in "abc"), strict=True)
    assert set(threads) == {"1"} and str(os.getpid()) not in pids
    with pytest.raises(UserError, match="b cannot"):
        loop.each(_job, [("a", False), ("b", True)], RunConfig(out=tmp_path, processes=2, device="cpu"))


# ---- several ranks --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [False, True])
def test_two_ranks_give_the_loss_of_one(tmp_path, shard):
    toy.train(toy.config(tmp_path / "one", noise=0.0, dropout=0.0))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.toy"]
    fields = ["noise=0.0", "dropout=0.0", f"shard={shard}"]
    done = subprocess.run(
        [*command, str(tmp_path / "two"), *fields], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-6)
    two, one = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert two.keys() == one.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
    # and what two ranks saved, one goes on from
    loop.load_run(toy.Toy(16, 0.0), toy.config(tmp_path / "two", noise=0.0, dropout=0.0), "toy/0")


# ---- faults ---------------------------------------------------------------------------------------------------------------------------


def test_a_nonfinite_loss_stops_and_names_the_last_checkpoint(tmp_path):
    def loss(model, batch):
        return {"good": model(batch[0]).square().mean(), "bad": torch.tensor(float("nan") if calls.append(1) or len(calls) > 5 else 0.0)}

    calls, cfg = [], toy.config(tmp_path, save_every=0.1)
    message = r"the loss is nan at step 5 \(good [\d.e-]+  bad nan\). The last good checkpoint is .*step-00000004.safetensors"
    with pytest.raises(UserError, match=message):
        loop.fit(nn.Linear(8, 1), loss, Batches(toy.data(), 12, 0), cfg, "toy/0")
    assert all(t.isfinite().all() for t in weights(tmp_path).values())


def interrupted(tmp_path: Path, **fields) -> Path:
    with pytest.raises(Interrupted), loop.interrupt_at(6):
        toy.train(toy.config(tmp_path, **fields))
    return tmp_path / "toy/0/step-00000006.safetensors"


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = interrupted(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"step-00000006.safetensors is not a whole safetensors file .*delete it"):
        toy.train(toy.config(tmp_path))


def test_a_damaged_optimizer_state_is_refused(tmp_path):
    path = interrupted(tmp_path).with_suffix(".pt")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"step-00000006.pt is not a torch checkpoint"):
        toy.train(toy.config(tmp_path))


def test_the_checkpoint_of_another_configuration_is_refused(tmp_path):
    interrupted(tmp_path, width=8)
    with pytest.raises(UserError, match=r"another configuration \(width 8 there, 16 here\): give another --out, or --no-resume"):
        toy.train(toy.config(tmp_path))


def test_the_checkpoint_of_another_paper_is_refused(tmp_path):
    interrupted(tmp_path)
    with pytest.raises(UserError, match=r"holds a checkpoint of tests\.?.*, not of "):
        loop.fit(nn.Linear(8, 1), lambda m, b: m(b[0]).mean(), Batches(toy.data(), 12, 0), RunConfig(out=tmp_path, batch=12), "toy/0")


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    """The kernel refuses to write past a limit, as it does when the disk is full."""
    path = interrupted(tmp_path)
    before = path.read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 1, len(before) - 1))
    full = process(tmp_path, preexec_fn=lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN), limit()))
    _, stderr = full.communicate(timeout=120)
    assert full.returncode != 0 and "could not be written" in stderr and "older files are untouched" in stderr
    assert path.read_bytes() == before
    assert not [p for p in path.parent.iterdir() if p.name.startswith(".")], "a half-written file was left behind"
    toy.train(toy.config(tmp_path))
    toy.train(toy.config(tmp_path / "whole"))
    assert equal(weights(tmp_path), weights(tmp_path / "whole"))


def test_unfinished_and_missing_runs_are_not_evaluated(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint: train first"):
        loop.load_run(toy.Toy(16, 0.1), toy.config(tmp_path), "toy/0")
    interrupted(tmp_path)
    with pytest.raises(UserError, match="stopped at step 6 of 20"):
        loop.load_run(toy.Toy(16, 0.1), toy.config(tmp_path), "toy/0")


# ---- published weights ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def linear(tmp_path):
    return nn.Linear(2, 3), tmp_path / "published.pth"


def test_published_weights_load_from_both_formats(linear, tmp_path):
    model, path = linear
    source = {"module.weight": torch.randn(3, 2), "module.bias": torch.randn(3), "module.step": torch.ones(())}
    rename = lambda name: None if name.endswith("step") else name.removeprefix("module.")
    torch.save({"model": source, "epoch": 3}, path)
    save_file(source, tmp_path / "published.safetensors")
    for file in (path, tmp_path / "published.safetensors"):
        nn.init.zeros_(model.weight)
        loop.load_weights(model, file, rename, key="model")
        assert torch.equal(model.weight, source["module.weight"])


def test_a_pickle_that_is_no_checkpoint_is_refused_and_not_run(linear, tmp_path):
    model, path = linear

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="is not a torch checkpoint of plain tensors"):
        loop.load_weights(model, path)
    torch.save({"model": Evil()}, path)
    with pytest.raises(UserError, match="is not a torch checkpoint of plain tensors"):
        loop.load_weights(model, path)
    assert not (tmp_path / "ran").exists()
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds no state dict"):
        loop.load_weights(model, path)


def test_a_foreign_checkpoint_is_never_half_loaded(linear):
    model, path = linear
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.save({"weight": torch.ones(3, 2), "scale": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"does not fit Linear: bias is missing; scale is not in the model\. Is it a checkpoint"):
        loop.load_weights(model, path)
    torch.save({"weight": torch.ones(3, 4), "bias": torch.ones(3)}, path)
    with pytest.raises(UserError, match=r"weight is \(3, 4\), not \(3, 2\)"):
        loop.load_weights(model, path)
    with pytest.raises(UserError, match="does not exist: check the path"):
        loop.load_weights(model, path.with_name("nowhere.pth"))
    assert equal(before, model.state_dict())
