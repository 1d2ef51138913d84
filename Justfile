# attention-atlas: `just` lists the recipes; each takes --help

atlas := "python -m common.cli"
# several processes on one machine: NPROC=8 just train PAPER; several machines: TORCHRUN="--nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500"
launch := if env("NPROC", "1") == "1" { atlas } else { "python -m torch.distributed.run --nproc-per-node " + env("NPROC", "1") + " " + env("TORCHRUN", "--standalone") + " -m common.cli" }

[private]
default:
    @just --list --unsorted

# the papers and their verdicts
list:
    @{{atlas}} list

# train, evaluate and judge a paper's claims: just repro moh --seeds 0 1 --steps 200
repro *args:
    @{{atlas}} repro {{args}}

# train only: NPROC=8 just train crossformer --scale full --data /imagenet
train *args:
    @{{launch}} train {{args}}

# evaluate a trained run, or a published checkpoint: just eval crossformer --weights crossformer-s.pth --data /imagenet
eval *args:
    @{{atlas}} eval {{args}}

# the fastest check of a paper, or of all: train, interrupt, resume, evaluate
smoke *papers:
    @{{atlas}} smoke {{papers}}

# write the tables of the READMEs and results/RESULTS.md
report:
    @{{atlas}} report

# make the last repro of a paper its reference under results/
record +papers:
    @{{atlas}} record {{papers}}

# measure the efficiency figures into results/bench.json
bench *names:
    @{{atlas}} bench {{names}}

# train a small checkpoint of data/checkpoints from scratch: just pretrain tiny-sd
pretrain *args:
    @{{atlas}} pretrain {{args}}

# what data the default runs use, and where real datasets go
data:
    @{{atlas}} data

# start a paper directory
new name:
    @{{atlas}} new {{name}}

# all tests, one worker per core
test *args:
    @OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 python -m pytest -n auto {{args}}

# style and common mistakes
lint:
    ruff check .
    ruff format --check .
