// The kernels for one instruction set; setup.py has the flags that it is compiled with.
#include "block.h"

extern const Kernels kernels_avx512vnni = {"avx512vnni", layer_norm, gelu, quantize, product, linear, attention_pack, attend,
                                     before_attention, after_attention};
