"""Lay the rows of a step out as prefix trees and deal them to ranks and micro-batches."""
