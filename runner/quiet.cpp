#include "quiet.h"

#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <sstream>

namespace dreamedge {

Quiet::Quiet() : log_(memfd_create("stderr", MFD_CLOEXEC)), saved_(dup(STDERR_FILENO)) {
    std::fflush(stderr);
    if (log_ >= 0 && saved_ >= 0) dup2(log_, STDERR_FILENO);
}

Quiet::~Quiet() {
    if (saved_ >= 0) dup2(saved_, STDERR_FILENO);
    for (const int opened : {log_, saved_}) {
        if (opened >= 0) close(opened);
    }
}

std::string Quiet::said() const {
    std::fflush(stderr);
    std::string text, line, together;
    std::array<char, 4096> part{};
    ssize_t n = 0;
    for (off_t at = 0; (n = pread(log_, part.data(), part.size(), at)) > 0 && text.size() < 1 << 16; at += n) {
        text.append(part.data(), static_cast<size_t>(n));
    }
    for (std::istringstream lines(text); std::getline(lines, line);) {
        if (!line.empty() && line.find("cpuinfo") == std::string::npos) together += line + " | ";
    }
    return together;
}

}  // namespace dreamedge
