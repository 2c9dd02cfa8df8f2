"""Teachers' outputs that are computed once: in memory, or on disk for any number of students."""

from sdkd_plugin.cache.building import precompute
from sdkd_plugin.cache.key import cache_key
from sdkd_plugin.cache.reading import TeacherCache

__all__ = ["TeacherCache", "cache_key", "precompute"]
