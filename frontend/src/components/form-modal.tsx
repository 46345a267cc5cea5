import { Modal, type ModalProps } from "@mantine/core";

interface Props extends Omit<ModalProps, "closeOnClickOutside"> {
  /** What its form does. It cannot be closed meanwhile: what comes of it, a secret perhaps, would not be seen. */
  action: { isPending: boolean; reset: () => void };
}

/** A dialog with a form in it, which a stray click beside it does not throw away. */
export function FormModal({ action, onClose, ...props }: Props) {
  const close = () => {
    if (action.isPending) return;
    action.reset();
    onClose();
  };
  return <Modal closeOnClickOutside={false} onClose={close} {...props} />;
}
