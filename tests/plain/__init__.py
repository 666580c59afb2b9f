"""Each published architecture as the shortest readable reference: oracle of the tests, and what the benchmarks compare with."""
