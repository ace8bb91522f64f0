"""The language model of flashlight-text's and torchaudio's beam search, imported only when made."""

from collections.abc import Sequence
from typing import Any

from ..errors import TempoError
from .scorer import ContinuationScorer

MISSING = (
    "ctc_decoder_lm needs torchaudio or flashlight-text, whose CTCDecoderLM it becomes; or give "
    "base and state"
)


def ctc_decoder_lm(
    scorer: ContinuationScorer, words: Sequence[str], base: Any = None, state: Any = None
) -> Any:
    """A scorer as a ``CTCDecoderLM``, by its methods start, score and finish.

        decoder = ctc_decoder(lexicon=..., tokens=..., lm=ctc_decoder_lm(scorer, words), ...)

    Scores are in nats, the scorer's weight and bonus included; the decoder's own lm_weight
    multiplies them again.

    Args:
        scorer: what gives words their score.
        words: the decoder's words by their index.
        base, state: the classes of a language model and its states; those of torchaudio, else of
            flashlight-text, if None.

    Raises:
        ValueError: if neither package is there.
    """
    if base is None or state is None:
        base, state = _classes()

    class TextLM(base):  # type: ignore[misc]
        """States are texts."""

        def __init__(self) -> None:
            super().__init__()
            self._texts: dict[Any, str] = {}

        def start(self, start_with_nothing: bool) -> Any:
            begun = state()
            # States of earlier utterances are not needed any more.
            self._texts = {begun: ""}
            return begun

        def score(self, before: Any, usr_token_idx: int) -> tuple[Any, float]:
            text, word = self._texts[before], words[usr_token_idx]
            ((found,),) = scorer.score_continuations([text], [[word]])
            after = before.child(usr_token_idx)
            self._texts[after] = scorer.joined(text, word)
            return after, found

        def finish(self, before: Any) -> tuple[Any, float]:
            text = self._texts[before]
            after = before.child(-1)
            self._texts[after] = text
            return after, scorer.weight * scorer.log_p_end([text])[0]

    return TextLM()


def _classes() -> tuple[Any, Any]:
    try:
        from torchaudio.models.decoder import (  # type: ignore[import-not-found, unused-ignore]
            CTCDecoderLM,
            CTCDecoderLMState,
        )

        return CTCDecoderLM, CTCDecoderLMState
    except ImportError:
        pass
    try:
        from flashlight.lib.text.decoder import (  # type: ignore[import-not-found, unused-ignore]
            LM,
            LMState,
        )

        return LM, LMState
    except ImportError as error:
        raise TempoError(MISSING) from error
