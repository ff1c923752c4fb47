"""Looking at trees."""

from paramtree.inspect.changes import diff as diff
from paramtree.inspect.page import show as show
from paramtree.inspect.ratios import update_ratios as update_ratios
from paramtree.inspect.size import count as count
from paramtree.inspect.size import nbytes as nbytes
from paramtree.inspect.statistics import find_nonfinite as find_nonfinite
from paramtree.inspect.statistics import stats as stats
from paramtree.inspect.summaries import summary as summary
