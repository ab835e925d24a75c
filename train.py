"""Trains a LLaMA. `Run` builds everything once, `Run.step` is a training step, `Run.loop` the rest.

    python train.py experiment=quickstart                     a laptop, under three minutes
    python train.py model=llama_60m data=c4                   one GPU
    torchrun --nproc-per-node 8 train.py model=llama_1b       eight

The same command goes on where a stopped run was saved. `python train.py --help` lists the settings.
Exit codes: 0 done, or saved on a signal; 2 bad configuration; 3 training stopped; 4 out of memory.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import signal
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import data
import optim
from configs.cli import answer, parse
from configs.resume import MAY_CHANGE, differences
from configs.schema import Config, ConfigError, to_yaml
from llama import checkpoint, metrics, pretrained
from llama.card import peak_flops
from llama.config import flops_per_token, num_params
from llama.eval import evaluate
from llama.generate import generate
from llama.model import Llama, build_model, compile_blocks
from optim import Comm

log = logging.getLogger("subspan")
PROMPTS = ("The ", "In the year", "It is")
SKIPPED_IN_A_ROW = 10  # steps in a row with a non-finite gradient before the run stops
LEAVE_S = 10  # how long a failed rank waits for the first one to say why: launchers kill all once one ended


class Stopped(RuntimeError):
    """Training cannot go on: exit code 3."""


class Run:
    """Everything one training run holds."""

    def __init__(self, cfg: Config, comm: Comm, folder: Path, source: Path | None) -> None:
        self.cfg, self.comm, self.folder, self.source = cfg, comm, folder, source
        assert cfg.steps is not None and cfg.optim.lr is not None  # Config.resolved filled them
        self.steps, self.lr = cfg.steps, cfg.optim.lr
        cuda = comm.device.type == "cuda"
        self.dtype = (
            torch.bfloat16 if (cfg.weights or ("bf16" if cuda else "fp32")) == "bf16" else torch.float32
        )
        before = checkpoint.read_state(source)["data"] if source else None
        files = comm.first(lambda: data.listing(cfg.data, before))  # hubs count calls: one for all ranks
        self.dataset = comm.node_first(
            lambda: data.build(
                cfg.data, vocab_size=cfg.model.vocab_size, seq_len=cfg.seq_len, seed=cfg.seed, files=files
            )
        )
        self.held_out = comm.node_first(self.dataset.validation)
        self.model = build_model(cfg.model, comm.device, self.dtype, cfg.seed)
        self.model.checkpoint_blocks(cfg.activations.checkpoint)
        if cfg.model.init_from and not source:
            pretrained.load_weights(self.model, Path(cfg.model.init_from))
        torch.manual_seed(cfg.seed)  # the first bases of projected methods
        try:
            self.opt = optim.attach(
                self.model,
                cfg.optim.name,
                accum_steps=cfg.accumulation(comm.world),
                group=comm.group,
                reduce="sum" if comm.group else None,
                **{k: v for k, v in vars(cfg.optim).items() if k != "name"},
            )
        except ValueError as e:  # what only the model shows: a rank that no matrix exceeds
            raise ConfigError([f"optim.{line}" for line in str(e).splitlines()]) from e
        self.opt.warmup_steps = round(cfg.optim.warmup * self.steps)
        saved = self.restore(source) if source else {}
        self.start = saved.get("step", 0)
        self.position: dict[str, Any] | None = saved.get("data")
        self.stream: str = saved.get("stream", "")  # running hash of every token trained on, over all ranks
        if cfg.compile == "auto" and cuda:
            torch._dynamo.config.fail_on_recompile_limit_hit = True  # instead of running eager in silence
            compile_blocks(self.model)
        rows = cfg.tokens_per_step // cfg.seq_len
        self.loader = self.dataset.loader(rows, comm.rank, comm.world, state=self.position, pin=cuda)
        self.book: metrics.Metrics | None = None
        if comm.rank == 0:
            self.announce()
            shutil.copyfile(self.dataset.tokenizer.path, folder / "tokenizer.model")
            self.book = metrics.Metrics(
                folder,
                start=self.start,
                steps=self.steps,
                flops_per_token=flops_per_token(cfg.model, cfg.seq_len),
                peak_flops=peak_flops(comm.device) * comm.world if cuda else None,
                device=comm.device,
                sinks=metrics.open_sinks(
                    [cfg.log] if isinstance(cfg.log, str) else cfg.log, folder, asdict(cfg)
                ),
            )

    def step(self, step: int, batch: data.Batch, valid: int) -> None:
        """One update. `valid` is the number of targets over all micro-batches and ranks: with it the sum of
        the micro-batches' losses is the mean over tokens, whatever their lengths."""
        lr = self.set_lr(step)
        size = self.cfg.micro_batch
        for _ in range(self.opt.passes):
            total = torch.zeros((), dtype=torch.float32, device=self.comm.device)
            for x, y in zip(batch.x.split(size), batch.y.split(size), strict=True):
                x, y = (t.to(self.comm.device, non_blocking=True) for t in (x, y))
                with self.precision():
                    loss = self.model(x, y) / valid
                loss.backward()
                total += loss.detach()
        self.opt.step()
        self.opt.zero_grad()
        self.position = batch.state
        self.comm.sum_(total)
        if self.book:
            found, bases = self.opt.first_round
            note = f"first bases {found}/{bases}" if found < bases else ""
            self.book.step(step, lr, self.cfg.tokens_per_step, {"loss": total, **self.opt.stats}, note)

    def precision(self) -> AbstractContextManager[Any]:
        """fp32 weights on a GPU: matrix products still run in bf16."""
        mixed = self.comm.device.type == "cuda" and self.dtype == torch.float32
        return torch.autocast("cuda", torch.bfloat16) if mixed else nullcontext()

    def set_lr(self, step: int) -> float:
        o = self.cfg.optim
        lr = self.lr * optim.factor(
            step, self.steps, schedule=o.schedule, warmup=o.warmup, min_lr_ratio=o.min_lr_ratio
        )
        for group in self.opt.param_groups:
            group["lr"] = lr
        return lr

    def loop(self) -> None:
        cfg, stop, failed, saved = self.cfg, Signals(), False, self.start
        if self.start == 0:
            self.evaluate(0)
        for step in range(self.start + 1, self.steps + 1):
            batch = next(self.loader)
            valid, digest, asked, broken = self.comm.sums(batch.valid, batch.digest, stop.asked, failed)
            if broken:
                raise Stopped(
                    f"{SKIPPED_IN_A_ROW} steps in a row had non-finite gradients and were skipped, "
                    f"the last at step {step - 1}; the newest save is step {saved}. "
                    "Try a lower optim.lr, or optim.clip=1"
                )
            if asked:
                if saved < step - 1:
                    self.save(step - 1)
                what = f"saved at step {step - 1}" if step > 1 else "stopped before the first step"
                log.info("%s: %s; the same command goes on from there", stop.name, what)
                return
            self.step(step, batch, max(1, valid))
            self.stream = hashlib.sha256(f"{self.stream}{digest}".encode()).hexdigest()
            last = step == self.steps
            if self.book and (self.book.due() or last):
                failed = any(row["skipped_in_a_row"] >= SKIPPED_IN_A_ROW for row in self.book.flush())
            if step % cfg.eval_every == 0 or last:
                self.evaluate(step)
            if step % cfg.save_every == 0 or last:
                self.save(step)
                saved = step

    def evaluate(self, step: int) -> None:
        comm = self.comm
        if self.book:
            self.book.flush()  # so that the steps' rate does not count the time from here on
        with self.precision():
            values = evaluate(
                self.model,
                self.held_out,
                self.cfg.micro_batch,
                rank=comm.rank,
                world=comm.world,
                all_sum=comm.sum_,
                device=comm.device,
            )
        if self.book:
            self.book.evaluation(step, values)
            write_samples(self.folder, step, self.model, self.dataset.tokenizer)
            metrics.draw(self.folder)
            self.book.resume_clock()
            if step == self.steps:
                self.book.line.print(
                    f"validation perplexity {values['val_ppl']:.2f}; a unigram model of the same tokens has"
                    f" {self.held_out.unigram_ppl:.2f}\nin {self.folder}: loss.png samples.txt metrics.jsonl"
                )

    def save(self, step: int) -> None:
        if self.book:
            self.book.sync()
            checkpoint.save(
                self.folder,
                step,
                self.model,
                self.opt.state_dict()["state"],
                {
                    "data": self.position,
                    "stream": self.stream,
                    "tokens": self.book.tokens,
                    "config": asdict(self.cfg),
                },
                keep_last=self.cfg.keep_last,
                write_config=self.write_config,
            )
            self.book.resume_clock()
        self.comm.sums(0)  # nobody leaves or goes on before the save is on disk

    def write_config(self, to: Path) -> None:
        t = self.dataset.tokenizer
        pretrained.write_config(
            self.cfg.model,
            to,
            dtype=self.dtype,
            eos_token_id=t.eos_id,
            pad_token_id=t.pad_id,
            seq_len=self.cfg.seq_len,
        )

    def restore(self, source: Path) -> dict[str, Any]:
        pretrained.load_weights(self.model, source)
        self.opt.load_state_dict({"state": checkpoint.load_optim(source, self.comm.device)})
        return checkpoint.read_state(source)

    def announce(self) -> None:
        cfg, comm = self.cfg, self.comm
        card = torch.cuda.get_device_name(comm.device) if comm.device.type == "cuda" else "CPU"
        k = cfg.accumulation(comm.world)
        log.info("run       %s%s", self.folder, f", going on from step {self.start}" if self.start else "")
        log.info("device    %d x %s, weights %s", comm.world, card, str(self.dtype).removeprefix("torch."))
        log.info("model     %s parameters, vocabulary %d", f"{num_params(cfg.model):,}", cfg.model.vocab_size)
        log.info(
            "data      %s, %s packing, %d validation tokens",
            cfg.data.name,
            cfg.data.packing,
            self.held_out.tokens,
        )
        log.info(
            "step      %d tokens = %d rank(s) x %d micro-batch(es) x %d x %d; %d steps",
            *(cfg.tokens_per_step, comm.world, k, cfg.micro_batch, cfg.seq_len, cfg.steps),
        )
        log.info("%s", self.opt.table())
        if cfg.compile == "auto" and comm.device.type == "cuda":
            log.info("compiling the model's blocks: the first step takes about a minute")

    def close(self) -> None:
        self.loader.close()
        if self.book:
            self.book.close()


class Signals:
    """SIGTERM, SIGUSR1 and Ctrl-C ask for a save and a clean end at the next step; a second Ctrl-C kills."""

    def __init__(self) -> None:
        self.asked, self.name = False, "stopped"
        for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(s, self.note)

    def note(self, number: int, frame: FrameType | None) -> None:
        self.asked, self.name = True, signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def write_samples(folder: Path, step: int, model: Llama, tokenizer: data.Tokenizer) -> None:
    """Replaces samples.txt by what the model writes now, older ones below."""
    path = folder / "samples.txt"
    before = path.read_text(encoding="utf-8") if path.exists() and step else ""
    texts = [
        f"[{p}]{generate(model, tokenizer, p, tokens=60, seed=n)[len(p) :]}" for n, p in enumerate(PROMPTS)
    ]
    path.write_text(f"=== step {step}\n" + "\n---\n".join(texts) + "\n\n" + before, encoding="utf-8")


def prepare(cfg: Config) -> tuple[Path, Path | None]:
    """Rank 0: the run folder and the save to go on from. ConfigError if that cannot be."""
    folder = Path(cfg.run.dir) / str(cfg.run.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(
            [f"run.dir={cfg.run.dir}: cannot make {folder} ({e.strerror}); name another"]
        ) from None
    source = checkpoint.latest(folder)
    if source:
        changes = differences(checkpoint.read_state(source)["config"], asdict(cfg))
        refused = [c for c in changes if not c.startswith(MAY_CHANGE)]
        if refused:
            raise ConfigError(
                [f"{c}; {source} was trained with the former: set it back, or run.name=NEW" for c in refused]
            )
        for change in changes:
            log.info("changed   %s", change)
    (folder / "config.yaml").write_text(to_yaml(cfg), encoding="utf-8")
    return folder, source


def train(cfg: Config, comm: Comm) -> None:
    folder, source = comm.first(lambda: prepare(cfg))
    if source and checkpoint.read_state(source)["step"] >= cfg.steps:
        log.info("%s is finished: it has its %d steps", folder, cfg.steps)
        return
    run = Run(cfg, comm, folder, source)
    try:
        run.loop()
    finally:
        run.close()


def main(argv: list[str]) -> int:
    code = attempt(argv)
    if code and optim.launcher(os.environ)[0]:
        time.sleep(LEAVE_S)  # the first rank says why before the launcher ends it
    return code


def attempt(argv: list[str]) -> int:
    """The exit code of one rank."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    log.setLevel(logging.INFO)  # ours; other packages' only from warnings on
    comm = None
    try:
        text = answer(argv)  # --help, --cfg
        if text is not None:
            print(text)
            return 0
        cfg = parse(argv)
        if cfg.model.init_from:
            cfg.model = replace(pretrained.load_config(cfg.model.init_from), init_from=cfg.model.init_from)
        cfg = cfg.resolved()
        comm = Comm.from_env()
        if comm.rank:
            log.setLevel(logging.ERROR)
        comm.first(lambda: cfg.accumulation(comm.world))
        train(cfg, comm)
    except (ConfigError, data.DataError, pretrained.FolderError) as e:
        if comm or optim.launcher(os.environ)[0] == 0:  # before the ranks have met all of them see the same
            print(e, file=sys.stderr)
        return 2
    except optim.Elsewhere:
        return 2
    except (Stopped, data.DamageLimit) as e:
        if comm is None or comm.rank == 0 or not isinstance(e, Stopped):  # all ranks stop alike: one says so
            print(f"stopped: {e}", file=sys.stderr)
        return 3
    except torch.OutOfMemoryError as e:
        print(f"out of memory: {str(e).splitlines()[0]}\ntry a smaller micro_batch", file=sys.stderr)
        return 4
    finally:
        if comm:
            comm.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
