"""The protocol: messages and stubs made from the `*.proto` files beside this one."""
