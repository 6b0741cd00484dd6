// What goes to stderr while one of these lives is kept from it: loading logs what no user asked for.
#pragma once

#include <string>

namespace dreamedge {

class Quiet {
  public:
    Quiet();
    ~Quiet();
    Quiet(const Quiet&) = delete;
    Quiet& operator=(const Quiet&) = delete;

    // In one line, without what is said of the processor: where loading failed, the cause.
    std::string said() const;

  private:
    int log_, saved_;
};

}  // namespace dreamedge
