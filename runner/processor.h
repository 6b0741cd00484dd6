// What the processor can do, as Linux names it.
#pragma once

#include <string>
#include <vector>

namespace dreamedge {

// Of those that decide which kernels XNNPACK takes.
std::vector<std::string> features();

}  // namespace dreamedge
