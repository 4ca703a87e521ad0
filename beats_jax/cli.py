"""The command line: `beats-jax COMMAND`, the same as `python -m beats_jax.cli COMMAND`.

A command is one function: its docstring is the help, it declares its arguments on the parser, and
what it returns runs them. Everything heavy is imported when a command runs, so `--help` is quick.

Exit codes: 0 all done; 2 wrong usage or input, with one line that says so; 3 done, but some files
were skipped; 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

Run = Callable[[argparse.Namespace], int]

# What `tokenize --agreement` compares with: iteration 1's tokens of `configs/local_esc50.py`.
RANDOM_PROJECTION = dict(
    mode="bestrq", codebook_size=1024, dim=16, pool=4, loudness_weight=0.1, seed=0
)


def prepare(parser: argparse.ArgumentParser) -> Run:
    """Decode a folder of audio once, to 16 kHz shards that training reads.

    SOURCE is a folder (its sub-folders are the classes), a folder with metadata.csv, ESC-50 as it
    comes, a manifest (.csv or .jsonl with a column `filename`), or the word `synthetic`. Broken and
    too short files are skipped and listed in OUT/report.json. A second call reuses the first's OUT.

    example:
      beats-jax prepare ~/ESC-50-master esc10 --filter esc10=True
    """
    parser.add_argument("source", metavar="SOURCE", help="folder, manifest, or 'synthetic'")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--filter", default="", help="rows to take: 'COLUMN=VALUE|VALUE,COLUMN!=VALUE'"
    )
    parser.add_argument("--jobs", type=int, help="processes that decode (default: one a CPU)")

    def run(args: argparse.Namespace) -> int:
        from beats_jax.data.prepare import prepare

        report = prepare(args.source, args.out, jobs=args.jobs, filter=args.filter)
        print(
            f"{args.out}: {report.clips} of {report.listed} clips, {report.hours:.2f} h;"
            f" {len(report.padded)} padded to one token column; skipped: {len(report.too_short)}"
            f" too short, {len(report.unreadable)} unreadable"
            + (f" (listed in {os.path.join(args.out, 'report.json')})" if report.skipped else "")
        )
        return 3 if report.skipped else 0

    return run


def stats(parser: argparse.ArgumentParser) -> Run:
    """Mean and standard deviation of a prepared data set's log-mel, for config.data.mean and std.

    example:
      beats-jax stats esc10 --filter 'fold!=5'
    """
    parser.add_argument("data", metavar="DATA", nargs="+", help="folders made by `prepare`")
    parser.add_argument("--filter", default="", help="clips to take, as for `prepare`")

    def run(args: argparse.Namespace) -> int:
        from beats_jax.data.prepare import dataset_stats
        from beats_jax.data.sources import join, open_clips

        clips = join({path: open_clips(path) for path in args.data}).select(args.filter)
        mean, std, frames = dataset_stats(clips)
        print(f"{len(clips)} clips, {frames} frames")
        print(f"--config.data.mean={mean:.5f} --config.data.std={std:.5f}")
        return 0

    return run


def probe(parser: argparse.ArgumentParser) -> Run:
    """Linear probe of a trained encoder, beside the same encoder untrained and a log-mel baseline.

    Logistic regression on each clip's mean feature, trained on all folds but one and scored on that
    one; C is chosen on the training folds alone.

    example:
      beats-jax probe runs/esc50/iter1/pretrain esc50_prepared --filter esc10=True
    """
    parser.add_argument("ckpt", metavar="STAGE", help="W/<iteration>/<stage>, or …@STEP")
    parser.add_argument("data", metavar="DATA", help="a folder made by `prepare`")
    parser.add_argument("--filter", default="", help="clips to take, as for `prepare`")
    parser.add_argument("--label", default="category", help="column of the class (category)")
    parser.add_argument("--fold", default="fold", help="column of the fold (fold)")
    parser.add_argument("--layer", type=int, help="0 = input of the first block … N = last (last)")

    def run(args: argparse.Namespace) -> int:
        from beats_jax.probe import probe_stage, probe_table

        rows = probe_stage(
            args.ckpt,
            args.data,
            filter=args.filter,
            label=args.label,
            fold=args.fold,
            layer=args.layer,
        )
        print(probe_table(rows))
        return 0

    return run


def tokenize(parser: argparse.ArgumentParser) -> Run:
    """Acoustic tokens of a prepared data set: store them for training, or try them against noise.

    --store writes the ids of every window once, so that pre-training need not tokenize in its step
    (--config.data.crop=grid --config.data.token_ids=OUT); interrupted, the same command goes on.
    --agreement adds white noise and counts the tokens that stay, for this tokenizer and for a
    random projection.

    example:
      beats-jax tokenize W/iter2/tokenizer prepared --store prepared/tokens --seconds 10
    """
    parser.add_argument("ckpt", metavar="TOKENIZER", help="W/<iteration>/tokenizer, …@STEP or .pt")
    parser.add_argument("data", metavar="DATA", help="folder made by `prepare`, or FOLDER,FOLDER")
    parser.add_argument("--store", metavar="OUT", help="folder for the ids")
    parser.add_argument("--agreement", metavar="PNG", help="picture to draw")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a window (10)")
    parser.add_argument("--filter", default="", help="clips to take, for --agreement")
    for name in ("mean", "std"):
        help = f"log-mel's {name} of the run that reads them (the tokenizer's own)"
        parser.add_argument(f"--{name}", type=float, help=help)
    parser.add_argument("--precision", default="auto", help="float32, bfloat16 or auto (auto)")
    parser.add_argument("--batch-size", type=int, default=16, help="windows at a time (16)")

    def run(args: argparse.Namespace) -> int:
        if not (args.store or args.agreement):
            raise ValueError("nothing to do: give --store OUT or --agreement PNG")
        from beats_jax import tokens
        from beats_jax.data.dataset import open_folders

        clips = open_folders(args.data)
        tokenizer = tokens.load_tokenizer(args.ckpt)
        options = dict(clip_seconds=args.seconds, batch_size=args.batch_size)
        if args.store:
            equal = tokens.store_tokens(
                tokenizer,
                clips,
                args.store,
                precision=args.precision,
                mean=args.mean,
                std=args.std,
                **options,
            )
            print(f"{args.store}: {100 * equal:.2f} % of a batch's ids are those of float32")
        if args.agreement:
            from beats_jax import plots

            snrs = (40, 30, 20, 10, 0)
            agreement = tokens.token_agreement(
                tokenizer, RANDOM_PROJECTION, clips.select(args.filter), snrs, **options
            )
            plots.plot_token_agreement(snrs, agreement, args.agreement)
            print("| tokens | " + " | ".join(f"{s} dB" for s in snrs) + " | chance | perplexity |")
            print("|---|" + "---|" * (len(snrs) + 2))
            for name, row in agreement.items():
                shares = " | ".join(f"{share:.3f}" for share in row["agreement"])
                print(f"| {name} | {shares} | {row['chance']:.4f} | {row['perplexity']:.0f} |")
        return 0

    return run


def info(parser: argparse.ArgumentParser) -> Run:
    """What a checkpoint is, and what it was made with: its family tree.

    example:
      beats-jax info runs/smoke/iter2/pretrain
    """
    parser.add_argument("path", metavar="PATH", help="W/<iteration>/<stage>, …@STEP or a .pt file")
    parser.add_argument("--json", action="store_true", help="print JSON")

    def run(args: argparse.Namespace) -> int:
        import json

        from beats_jax.inference import lineage_lines, load_model

        model = load_model(args.path)
        count = sum(x.size for x in _leaves(model.params)) + getattr(model.codebook, "size", 0)
        if args.json:
            print(json.dumps({**model.source, "parameters": count}, indent=1))
        else:
            print(f"{model.kind}, {count:,} parameters, log-mel {model.mean:.5f} ± {model.std:.5f}")
            print("\n".join(lineage_lines(model.source)))
        return 0

    return run


def _leaves(tree: Any) -> list[Any]:
    if not isinstance(tree, dict):
        return [tree]
    return [leaf for branch in tree.values() for leaf in _leaves(branch)]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _call(args: argparse.Namespace) -> int:
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # Orbax warns of what does not concern a reader
    return args.run(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit code."""
    if sys.stdin is None:  # closed: a pipe would get its number, and workers close theirs
        os.open(os.devnull, os.O_RDONLY)
    parser = _Parser(prog="beats-jax", description="BEATs audio pre-training in JAX.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (prepare, stats, tokenize, probe, info):
        first, _, rest = (command.__doc__ or "").partition("\n")
        subparser = commands.add_parser(
            command.__name__,
            help=first,
            description=f"{first}\n{rest}".replace("\n    ", "\n"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subparser.set_defaults(run=command(subparser), prog=subparser.prog)
    args = parser.parse_args(argv)
    try:
        return _call(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"{args.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{args.prog}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
