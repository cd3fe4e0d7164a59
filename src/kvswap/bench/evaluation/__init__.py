"""Evaluation on tasks: documents read once, questions answered by every method that is compared."""

from __future__ import annotations

from kvswap.bench.evaluation.asking import Asking
from kvswap.bench.evaluation.budget import Budget
from kvswap.bench.evaluation.capture import capture
from kvswap.bench.evaluation.evicted import Evicted
from kvswap.bench.evaluation.methods import FULL, FullAttention, KVSwap, Method
from kvswap.bench.evaluation.plan import Plan, choose_language
from kvswap.bench.evaluation.report import Report, Score, summarise
from kvswap.bench.evaluation.results import Results
from kvswap.bench.evaluation.run import Evaluation

__all__ = [
    "FULL",
    "Asking",
    "Budget",
    "Evaluation",
    "Evicted",
    "FullAttention",
    "KVSwap",
    "Method",
    "Plan",
    "Report",
    "Results",
    "Score",
    "capture",
    "choose_language",
    "summarise",
]
