"""Trains a LLaMA. `Run` builds everything once, `Run.step` is a training step, `Run.loop` the rest.

    python train.py experiment=quickstart                     a laptop, under three minutes
    python train.py model=llama_60m data=c4                   one GPU
    torchrun --nproc-per-node 8 train.py model=llama_1b       eight

The same command goes on where a stopped run was saved. `python train.py --help` lists the settings.
Exit codes: 0 done, or saved on a signal; 2 bad configuration; 3 training stopped; 4 out of memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import data
import optim
from configs.cli import answer, parse
from configs.resume import differences, may_change, way_out
from configs.schema import Config, ConfigError, to_yaml
from llama import checkpoint, lr_range, metrics, pretrained, spike
from llama.card import peak_flops
from llama.config import flops_per_token, num_params
from llama.eval import evaluate
from llama.generate import generate
from llama.journal import allowed_to_fail
from llama.lock import InUse, Lock, Signals
from llama.model import Llama, build_model, compile_blocks
from llama.saver import SaveFailed, Saver
from llama.trace import Trace
from optim import Comm

log = logging.getLogger("subspan")
PROMPTS = ("The ", "In the year", "It is")
REWINDS = 3  # to one save before a run with spike=rewind stops
SKIPPED_IN_A_ROW = 10  # steps in a row with a non-finite gradient before the run stops
LEAVE_S = 10  # how long a failed rank waits for the first one to say why: launchers kill all once one ended


class Stopped(RuntimeError):
    """Training cannot go on: exit code 3."""


class Run:
    """Everything one training run holds."""

    saver: Saver | None = None  # of rank 0
    book: metrics.Metrics | None = None  # likewise
    skip: spike.Skip | None = None  # with spike=skip
    rewinds: spike.Rewind | None = None  # of rank 0 with spike=rewind

    def __init__(self, cfg: Config, comm: Comm, folder: Path, source: Path | None) -> None:
        self.cfg, self.comm, self.folder, self.source = cfg, comm, folder, source
        assert cfg.steps is not None and cfg.optim.lr is not None  # Config.resolved filled them
        self.steps, self.lr = cfg.steps, cfg.optim.lr
        cuda = comm.device.type == "cuda"
        if cuda:
            optim.use_own_stream()
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
        kept = cfg.activations
        self.model.checkpoint_blocks(kept.checkpoint, kept.recompute == "down")
        if cfg.model.init_from and not source:
            with named(cfg):
                pretrained.load_weights(self.model, Path(cfg.model.init_from))
        torch.manual_seed(cfg.seed)  # the first bases of projected methods
        try:
            self.opt = optim.attach(
                self.model,
                cfg.optim.name,
                accum_steps=cfg.accumulation(comm.world),
                group=comm.group,
                reduce="sum" if comm.group else None,
                tokens=cfg.tokens_per_step // comm.world,
                velora=kept.layers and optim.Velora(kept.names, kept.size, kept.init or "average"),
                **{k: v for k, v in vars(cfg.optim).items() if k not in ("name", "lr_range")},
            )
        except ValueError as e:  # what only the model shows: a rank that no matrix exceeds
            lines = str(e).splitlines()
            raise ConfigError([x if x.startswith("activations.") else f"optim.{x}" for x in lines]) from e
        self.opt.warmup_steps = round(cfg.optim.warmup * self.steps)
        saved = self.restore_newest(source)
        self.start = saved.get("step", 0)
        self.position: dict[str, Any] | None = saved.get("data")
        self.stream: str = saved.get("stream", "")  # running hash of every token trained on, over all ranks
        if cfg.spike == "skip":
            self.skip = spike.Skip(saved.get("spike", {}), comm.device)
        self.gone_back: list[int] = []  # to these steps
        self.failed = self.back = False  # what rank 0 tells the others before the next step
        if cfg.compile == "auto" and cuda:
            torch._dynamo.config.fail_on_recompile_limit_hit = True  # instead of running eager in silence
            compile_blocks(self.model)
        rows = cfg.tokens_per_step // cfg.seq_len
        # What a step reads from the host, where a captured one looks for it.
        shape = (rows // comm.world, cfg.seq_len)
        self.batch = [torch.empty(shape, dtype=torch.int64, device=comm.device) for _ in "xy"]
        self.valid = torch.zeros((), device=comm.device)
        passes = cfg.accumulation(comm.world) * cfg.model.num_hidden_layers
        alone = cuda and comm.group is None
        self.runner = optim.Steps(self.opt, alone and cfg.graph == "auto", passes)
        self.loader = self.dataset.loader(rows, comm.rank, comm.world, state=self.position, pin=cuda)
        self.trace = Trace(folder if cfg.profile and comm.rank == 0 else None, self.start, self.steps)
        if comm.rank == 0:
            self.announce()
            self.saver = Saver(folder, cfg.keep_last, self.start)
            if cuda and not cfg.optim.lr_range:
                self.saver.reserve(self.tensors())
            self.rewinds = spike.Rewind(saved.get("spike", {})) if cfg.spike == "rewind" else None
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
            self.book.judge = self.judge

    def step(self, step: int, batch: data.Batch, valid: int) -> None:
        """One update. `valid` is the number of targets over all micro-batches and ranks: with it the sum of
        the micro-batches' losses is the mean over tokens, whatever their lengths."""
        lr = self.set_lr(step)
        self.valid.fill_(valid)
        for here, t in zip(self.batch, (batch.x, batch.y), strict=True):
            here.copy_(t, non_blocking=True)
        if self.opt.unseen:
            with self.opt.observing(), self.precision():
                for x in self.batch[0].split(self.cfg.micro_batch):
                    self.model.model(x)
        values = self.runner.run(self.micro_batches)
        self.position = batch.state
        self.comm.sum_(values["loss"])  # type: ignore[arg-type]
        if self.book:
            found, bases = self.opt.first_round
            note = f"first bases {found}/{bases}" if found < bases else ""
            self.book.step(step, lr, self.cfg.tokens_per_step, values, note)

    def micro_batches(self) -> torch.Tensor:
        """Forward and backward of a step's micro-batches, in turn; this rank's share of the loss."""
        xs, ys = (t.split(self.cfg.micro_batch) for t in self.batch)
        factor = None
        for _ in range(self.opt.passes):
            total = torch.zeros((), dtype=torch.float32, device=self.comm.device)
            for n, (x, y) in enumerate(zip(xs, ys, strict=True), 1):
                with self.precision():
                    loss = self.model(x, y) / self.valid
                total += loss.detach()
                if self.skip and n == len(xs):  # the update may happen inside this backward
                    if factor is None:
                        factor = self.skip.factor(self.comm.sum_(total.clone()))
                    loss = loss * factor
                loss.backward()
        return total

    def precision(self) -> AbstractContextManager[Any]:
        """fp32 weights on a GPU: matrix products still run in bf16."""
        mixed = self.comm.device.type == "cuda" and self.dtype == torch.float32
        return torch.autocast("cuda", torch.bfloat16) if mixed else nullcontext()

    def set_lr(self, step: int) -> float:
        o = self.cfg.optim
        if o.lr_range:
            lr = lr_range.lr_at(step, self.steps, self.lr)
        else:
            lr = self.lr * optim.factor(
                step, self.steps, schedule=o.schedule, warmup=o.warmup, min_lr_ratio=o.min_lr_ratio
            )
        for group in self.opt.param_groups:
            group["lr"] = lr
        return lr

    def loop(self) -> None:
        cfg, stop, step = self.cfg, Signals(), self.start
        if step == 0:
            self.evaluate(0)
        while step < self.steps:
            batch = self.loader.wait(lambda: stop.asked)  # an outage of the hub may last
            flags = (stop.asked, self.failed, self.back, self.save_is_due())
            counts = (batch.valid, batch.digest) if batch else (0, 0)
            valid, digest, asked, failed, back, due = self.comm.sums(*counts, *flags)
            if failed:
                newest = f"; the newest save is step {self.saver.newest}" if self.saver else ""
                raise Stopped(
                    f"{SKIPPED_IN_A_ROW} steps in a row had non-finite gradients and were skipped, "
                    f"the last at step {step}{newest}. Try a lower optim.lr, or optim.clip=1"
                )
            if back:
                step = self.go_back(step)
            if due:
                self.save(step)
            if asked:
                self.save(step, last=True)
                what = f"saved at step {step}" if step else "stopped before the first step"
                log.info("%s: %s; the same command goes on from there", stop.name, what)
                return
            assert batch is not None
            step += 1
            self.trace.begin(step)
            self.step(step, batch, max(1, valid))
            self.trace.end(step)
            self.stream = hashlib.sha256(f"{self.stream}{digest}".encode()).hexdigest()
            self.look(step)
            last = step == self.steps
            if step % cfg.eval_every == 0 or last:
                self.evaluate(step)
            if step % cfg.save_every == 0 or last:
                self.save(step, last=last)

    def look(self, step: int) -> None:
        """Rank 0, now and then: rows to disk; is training still sound? Has a save ended?"""
        if not self.book or not self.saver:
            return
        self.saver.poll()
        often = self.rewinds is not None and step % spike.CHECK_EVERY == 0
        if not (often or self.book.due() or step == self.steps):
            return
        self.book.flush()
        self.back = often and self.rewinds is not None and self.rewinds.found

    def judge(self, rows: list[dict[str, Any]]) -> None:
        """Every row, whoever had it written: a save and an evaluation do as well."""
        if self.rewinds:
            self.rewinds.note(rows)
        else:
            self.failed |= any(row["skipped_in_a_row"] >= SKIPPED_IN_A_ROW for row in rows)

    def go_back(self, step: int) -> int:
        """To the newest save from before the losses rose; the data goes on behind them. Returns its step."""
        source = self.comm.first(lambda: self.sound_save(step))
        saved = self.restore(source)
        self.stream = saved["stream"]
        if self.book and self.rewinds:
            self.book.back(saved["step"])
            self.book.write(
                [{"step": saved["step"], "gone_back_from": step, "high_from": self.rewinds.first}]
            )
            self.rewinds, self.back = spike.Rewind(saved["spike"]), False
        self.save(saved["step"])  # with the new position: a run that is killed now goes on here
        return saved["step"]

    def sound_save(self, step: int) -> Path:
        """Rank 0: the save to go back to; later ones are removed. Stopped where there is none."""
        assert self.saver and self.rewinds
        self.saver.close()
        first = self.rewinds.first
        high = f"the losses of steps {first} to {step} are out of line with those before"
        for path in checkpoint.complete(self.folder):
            if checkpoint.step_of(path) >= first:
                shutil.rmtree(path)
        source = checkpoint.latest(self.folder)
        if source is None:
            raise Stopped(f"{high}, and there is no save from before; try a lower optim.lr, or optim.clip=1")
        to = checkpoint.step_of(source)
        if self.gone_back.count(to) == REWINDS:
            raise Stopped(
                f"{high}; the run went back to step {to} {REWINDS} times already. "
                "Try a lower optim.lr, or optim.clip=1"
            )
        self.gone_back.append(to)
        log.warning("%s: back to the save of step %d, on with the data after them", high, to)
        return source

    def find_lr(self) -> None:
        """optim.lr_range=true: steps of rising lr until the loss gets worse; a plot and a suggestion."""
        stop, lrs, losses = Signals(), list[float](), list[float | None]()
        for step in range(1, self.steps + 1):
            batch = self.loader.wait(lambda: stop.asked)
            flags = (stop.asked, lr_range.ended(losses))
            valid, asked, ended = self.comm.sums(batch.valid if batch else 0, *flags)
            if asked or ended or batch is None:
                break
            self.step(step, batch, max(1, valid))
            if self.book and (step % 10 == 0 or step == self.steps):
                for row in self.book.flush():
                    lrs.append(row["lr"])
                    losses.append(row["loss"])
        if self.book:
            chosen = lr_range.suggest(lrs, losses)
            lr_range.draw(self.folder / "lr_range.png", lrs, losses, chosen)
            what = f"try optim.lr={chosen:.1e}" if chosen else "the loss never fell: try a lower optim.lr"
            self.book.line.print(
                f"{what}; lr went from {lrs[0]:.1e} to {lrs[-1]:.1e} in {len(lrs)} steps\n"
                f"in {self.folder}: lr_range.png metrics.jsonl"
            )

    def evaluate(self, step: int) -> None:
        comm = self.comm
        if self.book:
            self.book.flush()  # so that the steps' rate does not count the time from here on
        with self.precision(), self.runner.memory():
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
            with allowed_to_fail(self.folder / "samples.txt"):
                write_samples(self.folder, step, self.model, self.dataset.tokenizer)
            with allowed_to_fail(self.folder / "loss.png"):
                metrics.draw(self.folder)
            self.book.resume_clock()
            if step == self.steps:
                self.book.line.print(
                    f"validation perplexity {values['val_ppl']:.2f}; a unigram model of the same tokens has"
                    f" {self.held_out.unigram_ppl:.2f}\nin {self.folder}: loss.png samples.txt metrics.jsonl"
                )

    def save_is_due(self) -> bool:
        """Rank 0's clock, not the system's, which may be set back."""
        if not self.saver or not self.cfg.save_minutes:
            return False
        return time.monotonic() - self.saver.saved_at >= 60 * self.cfg.save_minutes

    def save(self, step: int, last: bool = False) -> None:
        """Starts a save. last: all ranks wait until it is on disk; Stopped where it cannot be."""
        error = None
        if self.book and self.saver and not (last and self.saver.newest == step):
            self.book.sync()
            try:
                self.saver.save(step, self.tensors(), self.texts(step), last=last)
            except SaveFailed as e:
                error = Stopped(f"{e}. Free some space; the same command goes on from the newest save")
            self.book.resume_clock()
        if last:
            self.comm.together(error)

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """What a save holds, by file."""
        state = self.opt.state_dict()["state"]
        flat = {f"{name}:{k}": t for name, tensors in state.items() for k, t in tensors.items()}
        return {"model.safetensors": checkpoint.weights(self.model), "optim.safetensors": flat}

    def texts(self, step: int) -> dict[str, str]:
        assert self.book
        t, judge = self.dataset.tokenizer, self.skip or self.rewinds
        state = {
            "step": step,
            "data": self.position,
            "stream": self.stream,
            "tokens": self.book.tokens,
            "spike": judge.state() if judge else {},
            "config": asdict(self.cfg),
        }
        config = pretrained.config_text(
            self.cfg.model,
            dtype=self.dtype,
            eos_token_id=t.eos_id,
            pad_token_id=t.pad_id,
            seq_len=self.cfg.seq_len,
        )
        return {"config.json": config, checkpoint.STATE: json.dumps(state, indent=1)}

    def restore(self, source: Path) -> dict[str, Any]:
        """FolderError where the save is not one of this model, method and data; the weights may be its by
        then."""
        saved, file = checkpoint.read_state(source), checkpoint.STATE
        try:
            self.dataset.check_position(saved["data"])
            file = "model.safetensors"
            pretrained.load_weights(self.model, source)
            file = "optim.safetensors"
            self.opt.load_state_dict({"state": checkpoint.load_optim(source)})
        except ValueError as e:
            raise pretrained.FolderError(f"{source}: {file}: {e}") from None
        return saved

    def restore_newest(self, source: Path | None) -> dict[str, Any]:
        """Of `source`, or of the newest save before it that fits; empty without any save."""
        while source:
            try:
                return self.restore(source)
            except pretrained.FolderError as e:
                checkpoint.refuse(source, str(e).removeprefix(f"{source}: "))
            source = self.comm.first(partial(choose, self.cfg, self.folder, source))
        return {}

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
        if self.saver:
            self.saver.close()
        if self.book:
            self.book.close()


def write_samples(folder: Path, step: int, model: Llama, tokenizer: data.Tokenizer) -> None:
    """Replaces samples.txt by what the model writes now, older ones below."""
    path = folder / "samples.txt"
    before = path.read_text(encoding="utf-8") if path.exists() and step else ""
    texts = [
        f"[{p}]{generate(model, tokenizer, p, tokens=60, seed=n)[len(p) :]}" for n, p in enumerate(PROMPTS)
    ]
    path.write_text(f"=== step {step}\n" + "\n---\n".join(texts) + "\n\n" + before, encoding="utf-8")


def prepare(cfg: Config, lock: Lock) -> tuple[Path, Path | None]:
    """Rank 0: the run folder and the save to go on from. ConfigError if that cannot be."""
    folder = Path(cfg.run.dir) / str(cfg.run.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not lock.take(folder):
            log.warning("%s: its file system knows no locks; start only one process there", folder)
        (folder / "checkpoints").mkdir(exist_ok=True)
        checkpoint.tidy(folder)
        (folder / "config.yaml.tmp").write_text(to_yaml(cfg), encoding="utf-8")
    except InUse as e:
        raise ConfigError([f"run.name={cfg.run.name}: {e}; stop that one, or run.name=NEW"]) from None
    except OSError as e:
        raise ConfigError(
            [f"run.dir={cfg.run.dir}: {e.filename or folder}: {e.strerror}; mend that or name another"]
        ) from None
    return folder, None if cfg.optim.lr_range else choose(cfg, folder)


def choose(cfg: Config, folder: Path, before: Path | None = None) -> Path | None:
    """Rank 0: the newest good save (older than `before`), None where none was ever made. ConfigError if all
    are bad: to begin anew would write over what may be mended."""
    source = checkpoint.latest(folder, pretrained.misfit, before)
    if source is None:
        if checkpoint.complete(folder):
            raise ConfigError(
                [f"run.name={cfg.run.name}: no save in {folder} can be used; mend one, or run.name=NEW"]
            )
        return None
    changes = differences(checkpoint.read_state(source)["config"], asdict(cfg))
    refused = [c for c in changes if not may_change(c)]
    if refused:
        raise ConfigError([f"{c}; {way_out(c, source)}" for c in refused])
    for change in changes:
        log.info("changed   %s", change)
    return source


def train(cfg: Config, comm: Comm) -> None:
    lock = Lock()
    try:
        folder, source = comm.first(lambda: prepare(cfg, lock))
        if source and checkpoint.read_state(source)["step"] >= cfg.steps:
            log.info("%s is finished: it has its %d steps", folder, cfg.steps)
            return
        run = Run(cfg, comm, folder, source)
        try:
            if comm.rank == 0:  # nothing was refused
                os.replace(folder / "config.yaml.tmp", folder / "config.yaml")
            run.find_lr() if cfg.optim.lr_range else run.loop()
        finally:
            run.close()
    finally:
        if lock.held:  # not of a run that another process trains
            with suppress(OSError):
                (Path(cfg.run.dir) / str(cfg.run.name) / "config.yaml.tmp").unlink()
        lock.release()


@contextmanager
def named(cfg: Config) -> Iterator[None]:
    """What is wrong with the folder of model.init_from is said with the key."""
    try:
        yield
    except pretrained.FolderError as e:
        raise ConfigError([f"model.init_from={cfg.model.init_from}: {e}"]) from None


def out_of_memory(error: Exception, cfg: Config, comm: Comm | None) -> None:
    """Says what would need less, and leaves the allocator's snapshot in the run folder."""
    world = comm.world if comm else 1
    print(f"out of memory: {(str(error).splitlines() or [''])[0]}\n{cfg.smaller(world)}", file=sys.stderr)
    if comm and comm.device.type == "cuda":
        path = Path(cfg.run.dir) / str(cfg.run.name) / f"out_of_memory_{comm.rank}.pickle"
        with allowed_to_fail(path):
            torch.cuda.memory._dump_snapshot(str(path))
            print(f"{path}: what held the memory (open it in docs.pytorch.org/memory_viz)", file=sys.stderr)


def main(argv: list[str]) -> int:
    code = attempt(argv)
    if code and optim.launcher(os.environ)[0]:
        time.sleep(LEAVE_S)  # the first rank says why before the launcher ends it
    return code


def attempt(argv: list[str]) -> int:
    """The exit code of one rank."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True, handlers=[metrics.Console()])
    log.setLevel(logging.INFO)  # ours; other packages' only from warnings on
    comm = None
    try:
        text = answer(argv)  # --help, --cfg
        if text is not None:
            print(text)
            return 0
        cfg = parse(argv)
        if cfg.model.init_from:
            with named(cfg):
                shapes = pretrained.load_config(cfg.model.init_from)
            cfg.model = replace(shapes, init_from=cfg.model.init_from, pad=cfg.model.pad)
        cfg = cfg.resolved()
        comm = Comm.from_env()
        if comm.rank:
            log.setLevel(logging.ERROR)
        comm.first(lambda: cfg.accumulation(comm.world))
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
            torch.use_deterministic_algorithms(True)
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
    except (RuntimeError, MemoryError) as e:  # torch says of a card and of the host by two types
        if not isinstance(e, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(e):
            raise
        out_of_memory(e, cfg, comm)
        return 4
    except OSError as e:  # the disk, while a run is set up
        print(f"stopped: {e.filename or 'a file'}: {e.strerror or e}", file=sys.stderr)
        return 3
    finally:
        if comm:
            comm.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
