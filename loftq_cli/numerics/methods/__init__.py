"""LoftQ, refined, weighted and QA-LoRA: the alternation of quantizer and low-rank factors."""
