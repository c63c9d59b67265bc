// The switch between fibers, in the assembly of each CPU architecture.
#include "fiber.h"

#if defined(__x86_64__)
asm(R"(
.text
.globl hypenet_emu_switch
.hidden hypenet_emu_switch
.type hypenet_emu_switch, @function
hypenet_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r15
  pushq %r14
  pushq %r13
  pushq %r12
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r12
  popq %r13
  popq %r14
  popq %r15
  popq %rbx
  popq %rbp
  ret
.size hypenet_emu_switch, .-hypenet_emu_switch

.globl hypenet_emu_start
.hidden hypenet_emu_start
.type hypenet_emu_start, @function
hypenet_emu_start:
  .cfi_startproc
  .cfi_undefined rip
  andq $-16, %rsp
  call *%r12
  ud2
  .cfi_endproc
.size hypenet_emu_start, .-hypenet_emu_start
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl hypenet_emu_switch
.hidden hypenet_emu_switch
.type hypenet_emu_switch, %function
hypenet_emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size hypenet_emu_switch, .-hypenet_emu_switch

.globl hypenet_emu_start
.hidden hypenet_emu_start
.type hypenet_emu_start, %function
hypenet_emu_start:
  .cfi_startproc
  .cfi_undefined x30
  blr x19
  brk #1
  .cfi_endproc
.size hypenet_emu_start, .-hypenet_emu_start
)");
#endif
