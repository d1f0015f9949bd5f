// Every unit at once, for setuptools: it names objects by their sources alone, so that the four builds, which it makes at
// the same time, would take each other's.

#include "attention.cpp"
#include "kernels.cpp"
#include "linear.cpp"
#include "quantized.cpp"
#include "rows.cpp"
