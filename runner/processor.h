// What the processor can do, as Linux names it.
#pragma once

#include <string>
#include <vector>

namespace dreamedge {

// Of those that decide which kernels XNNPACK takes.
std::vector<std::string> features();

// Whether XNNPACK adds the products of float16 in float16 here, as it does where it can.
bool native_float16();

// Whether a known product of integers is right, by SME's instruction for it; true where there is none. QEMU before 10
// has it wrong: there no figure says anything of the program.
bool multiplies_right();

}  // namespace dreamedge
