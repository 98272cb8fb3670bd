"""The layers of Qwen3-Next, each for one rank's share of the weights."""
