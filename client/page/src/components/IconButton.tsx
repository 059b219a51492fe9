import type { ReactNode, Ref } from 'react';
import { Button, Tooltip, TooltipTrigger, type ButtonProps } from 'react-aria-components';

interface Props extends Omit<ButtonProps, 'children' | 'aria-label'> {
  label: string;
  ref?: Ref<HTMLButtonElement>;
  children: ReactNode;
}

/** A button with a picture; its name is read out and shown beside it. */
export function IconButton({ label, children, ...props }: Props) {
  return (
    <TooltipTrigger delay={400}>
      <Button {...props} aria-label={label} className={`icon-button ${props.className ?? ''}`}>
        {children}
      </Button>
      <Tooltip className="tooltip" offset={6}>
        {label}
      </Tooltip>
    </TooltipTrigger>
  );
}
