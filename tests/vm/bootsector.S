# A whole operating system for a disk: one sector that SeaBIOS starts. On the serial port it
# says its banner with a mark, and obeys letters: w writes the next mark to the disk, r resets,
# others are echoed. The power button switches off. Real mode throughout.
	.code16
	.globl _start
_start:
	cli
	xor %ax, %ax
	mov %ax, %ds
	mov %ax, %es
	mov %ax, %ss
	mov $0x7c00, %sp
	mov %dl, drive
	mov $0x602, %dx			# PM1_EN of q35: the power button
	mov $0x0100, %ax
	out %ax, %dx
	mov $banner, %si
	call print
wait:
	mov $0x600, %dx			# PM1_STS
	in %dx, %ax
	test $0x01, %ah
	jnz off
	mov $0x3fd, %dx
	in %dx, %al
	test $0x01, %al
	jz wait
	mov $0x3f8, %dx
	in %dx, %al
	cmp $'w', %al
	je write
	cmp $'r', %al
	je reset
	out %al, %dx
	jmp wait
write:
	incb mark
	mov $0x0301, %ax
	mov $0x0001, %cx
	xor %dh, %dh
	mov drive, %dl
	mov $0x7c00, %bx
	int $0x13
	cli
	mov $written, %si
	call print
	jmp wait
reset:
	mov $0xcf9, %dx
	mov $0x06, %al
	out %al, %dx
	hlt
off:
	mov $goodbye, %si
	call print
	mov $0x604, %dx			# PM1_CNT: S5
	mov $0x2000, %ax
	out %ax, %dx
	hlt
print:
	mov $0x3f8, %dx
1:	lodsb
	test %al, %al
	jz 2f
	out %al, %dx
	jmp 1b
2:	ret
banner:	.ascii "disk "
mark:	.ascii "A"
	.asciz " runs\r\n"
written: .asciz "written\r\n"
goodbye: .asciz "off\r\n"
drive:	.byte 0
	.org 510
	.word 0xaa55
