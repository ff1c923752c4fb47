"""Reports on trees and models: sizes, outlines, statistics, differences, layers, shardings, plots."""
