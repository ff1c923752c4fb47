"""Looking at trees: their size, outline, statistics, differences, layers, and pictures of them."""
