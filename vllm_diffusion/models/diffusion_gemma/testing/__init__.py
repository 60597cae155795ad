"""What tests, benchmarks and the demo need of this family; imports no vLLM.

checkpoint      a complete random checkpoint, of tokenizer and weights
adapters        random LoRA adapters in the layout of PEFT
quantisable     which matrices the released quantised checkpoints hold in fewer bits
reference       what Transformers calls the parts of its model
"""
