"""What an optimizer step computes in RL and in SFT, and the optimizer."""
