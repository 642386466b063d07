"""Methods that generate() of transformers needs in a hybrid model."""

from typing import NoReturn

from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from mambactl.models.cache import HybridCache
from mambactl.models.transformers_names import CACHE


def require_own(cache: object) -> HybridCache:
    """The cache; raises ValueError for one that mixers cannot fill."""
    if not isinstance(cache, HybridCache):
        raise ValueError(
            f"the cache is a {type(cache).__name__}: a hybrid model keeps a HybridCache, "
            "which generate() and forward(use_cache=True) make themselves"
        )
    return cache


class HybridGenerationMixin(GenerationMixin):
    """Generation with a `HybridCache`, by a target or by the model that drafts for one."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # no other cache holds a state
        return False

    def _prepare_cache_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, object],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Put an empty cache in `model_kwargs` where it has none; ValueError for other kinds."""
        asked = generation_config.cache_implementation
        if asked not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={asked!r}: a hybrid model has one kind of cache, HybridCache"
            )
        given = model_kwargs.get(CACHE)
        if given is not None:
            setattr(require_own(given), "_is_user_defined", True)  # noqa: B010
        elif generation_config.use_cache is not False:
            copies = generation_config.num_beams or 1, generation_config.num_return_sequences or 1
            rows = batch_size * max(copies)
            # of the model that this class is mixed into
            config, device = self.config, self.device  # pyright: ignore[reportAttributeAccessIssue]
            cache = HybridCache(config, rows, device)
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs[CACHE] = cache

    def init_continuous_batching(self, *args: object, **kwargs: object) -> NoReturn:
        """Raise NotImplementedError: there are no pages of a state."""
        raise NotImplementedError(
            "continuous batching cuts caches into pages, which a recurrent state has not: "
            "use generate(), which takes a batch"
        )
