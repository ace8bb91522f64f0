"""Mixed models: regressions that check the results of matching."""

import warnings
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame
from statsmodels.formula.api import mixedlm  # type: ignore[import-untyped]

from .matching import ADJUSTED
from .statistics import CONFIDENCE, MIN_PROMPTS, TOO_SMALL

SIBLING_MODEL = "attention ~ sibling + C(distance) + logit + query_step + n_keys"
CONDITION_MODEL = "attention ~ sibling * second + C(distance) + logit + query_step + n_keys"
#: Random effects of both: each prompt has its own level and its own effect of siblings.
RANDOM = "~ sibling"
SEED_MODEL = "effect ~ 1"

#: Columns of a fit, see :func:`_fit`.
FIT = ["formula", "term", "n_prompts", "n_rows", "estimate", "low", "high", "p", "var_prompt"]
FIT += ["var_sibling", "var_residual", "converged", "note"]


def observations(keys: DataFrame, received: np.ndarray) -> DataFrame:
    """One row for each generated key of an earlier step, sibling or single, matched or not.

    Args:
        keys: of :func:`~.matching.keys_of`.
        received: of the same tables, [entries, layers, heads].

    Returns:
        prompt_id, condition, sibling (0 or 1), distance, logit (of its probability), query_step,
        n_keys, attention (mean over layers and heads).
    """
    keys = keys[keys["kind"] != "prompt"]
    received = received.mean(axis=(1, 2), dtype=np.float64)
    columns = ["prompt_id", "condition", "distance", *ADJUSTED]
    return keys[columns].assign(
        sibling=(keys["kind"] == "sibling").astype(float), attention=received[keys["row"]]
    )


def sibling_model(seen: DataFrame) -> dict[str, Any]:
    """Attention to siblings minus attention to single tokens, in one condition.

    Args:
        seen: rows of :func:`observations`.
    """
    return _fit(SIBLING_MODEL, seen, "attention", "sibling", RANDOM)


def condition_model(first: DataFrame, second: DataFrame) -> dict[str, Any]:
    """That difference in the second condition minus the same in the first."""
    both = pd.concat([first.assign(second=0.0), second.assign(second=1.0)])
    return _fit(CONDITION_MODEL, both, "attention", "sibling:second", RANDOM)


def seed_model(effects: DataFrame) -> dict[str, Any]:
    """Effects of runs that differ in their seed: variance between prompts and between seeds.

    Args:
        effects: prompt_id, effect; one row a run.

    Returns:
        A fit, see :func:`_fit`; ``var_residual`` is the variance between seeds.
    """
    return _fit(SEED_MODEL, effects, "effect", "Intercept", None)


def _fit(
    formula: str, rows: DataFrame, response: str, term: str, random: str | None
) -> dict[str, Any]:
    """A linear mixed model by restricted maximum likelihood (Laird and Ware 1982).

    Returns:
        formula, term, n_prompts, n_rows, estimate, low, high, p (Wald; of the term), var_prompt,
        var_sibling (between prompts, of level and of siblings' effect), var_residual, converged,
        note: warnings of statsmodels, or why there is no model. A fit that did not converge keeps
        its estimates.
    """
    found: dict[str, Any] = {
        "formula": formula,
        "term": term,
        "n_prompts": rows["prompt_id"].nunique(),
        "n_rows": len(rows),
    }
    found = dict.fromkeys(FIT) | found | {"converged": False, "note": ""}
    if found["n_prompts"] < MIN_PROMPTS:
        return found | {"note": TOO_SMALL}
    if random is not None and rows["sibling"].nunique() < 2:
        return found | {"note": "no siblings or no single tokens"}
    # Optimisers expect values near 1, and attention is near 0.01.
    scale = float(rows[response].std())
    if not scale > 0:
        return found | {"note": "no variance"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = mixedlm(
                formula,
                rows.assign(**{response: rows[response] / scale}),
                groups="prompt_id",
                re_formula=random,
            )
            fit = model.fit(reml=True)
            low, high = fit.conf_int(alpha=1 - CONFIDENCE).loc[term] * scale
            between = np.diag(fit.cov_re) * scale**2
            found |= {
                "estimate": float(fit.fe_params[term]) * scale,
                "low": float(low),
                "high": float(high),
                "p": float(fit.pvalues[term]),
                "var_prompt": float(between[0]),
                "var_sibling": float(between[1]) if len(between) > 1 else None,
                "var_residual": float(fit.scale) * scale**2,
                "converged": bool(fit.converged),
            }
        except (np.linalg.LinAlgError, ValueError) as error:
            found["note"] = f"no fit: {error}"
    said = dict.fromkeys(" ".join(str(warning.message).split()) for warning in caught)
    found["note"] = "; ".join(filter(None, [found["note"], *said]))
    return {
        name: None if isinstance(value, float) and not np.isfinite(value) else value
        for name, value in found.items()
    }
