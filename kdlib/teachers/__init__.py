"""Teachers: CRF and softmax taggers, a GLiNER, any Hugging Face token classifier, one that
learns."""
